"""The page in a real browser. Needs the extra `demo`, selenium, Chromium and its driver."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from openpae.demo.studio import Studio
from openpae.quickstart.run import PRETRAINED

pytestmark = [pytest.mark.slow, pytest.mark.assets, pytest.mark.filterwarnings("default")]

TABS = {
    "Encode": {"segments": ("6", "encode-3")},
    "Move": {"angle": ("20", "move-1"), "direction": ("3", "move-1")},
    "Between pictures": {"frames": ("5", "between")},
    "Generate": {
        "generate-steps": ("8", "generated"),
        "generate-guidance": ("3", "generated"),
        "count": ("2", "generated"),
        "seed": ("5", "generated"),
    },
    "Between seeds": {
        "seeds-steps": ("8", "seeds"),
        "seeds-guidance": ("3", "seeds"),
        "first-seed": ("4", "seeds"),
        "last-seed": ("9", "seeds"),
        "seed-frames": ("4", "seeds"),
    },
}
"""Tab -> control -> (new value, picture that it changes)."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from openpae.demo.page import CSS, THEME, build

    studio = Studio.load(PRETRAINED / "tokenizer", PRETRAINED / "generator", torch.device("cpu"), emoji=True)
    page = build(studio)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=THEME, css=CSS, ssr_mode=False)
    yield url
    page.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--window-size=1100,1500"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def wait(ready: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, "the page did not change"
        time.sleep(0.1)
    return value


def source(driver: Any, name: str) -> str:
    pictures = driver.find_elements("css selector", f"#{name} img")
    return str(pictures[0].get_attribute("src")) if pictures else ""


def act(driver: Any, shown: str, action: Callable[[], object]) -> float:
    """Do something, and wait until a picture changes: the seconds that it took."""
    before, start = wait(lambda: source(driver, shown)), time.monotonic()
    action()
    wait(lambda: source(driver, shown) not in ("", before))
    return time.monotonic() - start


def open_tab(driver: Any, name: str) -> None:
    tabs = driver.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if tab.text == name and tab.is_displayed()).click()


def enter(driver: Any, name: str, value: str) -> None:
    field = driver.find_element("css selector", f"#{name} input[type=number]")
    field.send_keys("\ue009a\ue000", value, "\t")  # Ctrl-A, the value, Tab


def check(driver: Any) -> None:
    """No error in the console, nothing from other sites."""
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(x => x.name)")
    assert [name for name in loaded if "127.0.0.1" not in name and not name.startswith("data:")] == []


def keep(driver: Any, name: str) -> None:
    """Keep a screenshot in the folder that the environment names."""
    if folder := os.environ.get("OPENPAE_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_every_control_changes_its_picture(address: str, browser: Any) -> None:
    browser.get(address)
    wait(lambda: source(browser, "encode-4"))
    for tab, controls in TABS.items():
        open_tab(browser, tab)
        for name, (value, shown) in controls.items():
            seconds = act(browser, shown, lambda name=name, value=value: enter(browser, name, value))
            print(f"{tab}: {name} {seconds:.2f} s")
        keep(browser, tab)
    check(browser)


def test_other_classes_files_and_drawings(address: str, browser: Any, tmp_path: Path) -> None:
    browser.get(address)
    wait(lambda: source(browser, "encode-4"))

    def upload(name: str, file: Path) -> None:
        browser.find_element("css selector", f"#{name} button[aria-label='Remove Image']").click()
        wait(lambda: browser.find_elements("css selector", f"#{name} input[type=file]"))
        browser.find_element("css selector", f"#{name} input[type=file]").send_keys(str(file))

    Image.new("LA", (300, 90), (40, 255)).save(tmp_path / "grey.png")
    act(browser, "encode-1", lambda: upload("given", tmp_path / "grey.png"))
    open_tab(browser, "Between pictures")
    act(browser, "between", lambda: upload("second", tmp_path / "grey.png"))
    for tab, name, shown in (("Generate", "generate", "generated"), ("Between seeds", "seeds", "seeds")):
        open_tab(browser, tab)

        def choose(name: str = name) -> None:
            browser.find_element("css selector", f"#{name}-class input").click()
            choices = wait(lambda: browser.find_elements("css selector", "[role=option]"))
            next(choice for choice in choices if "Flags" in choice.text).click()

        act(browser, shown, choose)
    open_tab(browser, "Encode")
    browser.find_element("id", "use").click()

    def message() -> str:  # it fades in: at first it has no text
        return "".join(
            each.text for each in browser.find_elements("css selector", "[data-testid=toast-body]")
        )

    assert "the drawing is empty: draw something first" in wait(message)
    check(browser)


def test_a_narrow_screen_needs_no_sideways_scrolling(address: str, browser: Any) -> None:
    narrow = {"width": 390, "height": 2400, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    browser.get(address)
    wait(lambda: source(browser, "encode-4"))
    keep(browser, "narrow")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    check(browser)
