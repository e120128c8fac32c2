"""The demo's functions, from pictures and numbers to pictures and sentences, without Gradio."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from openpae.demo import studio as module
from openpae.demo.inputs import as_pixels, drawn_face, drawn_house
from openpae.demo.studio import ANGLES, Studio, colour_segments
from openpae.models.dit import LightningDiT
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import write_generator
from openpae.models.tokenizer import PAE
from openpae.storage.model_folder import identity_of


@pytest.fixture
def studio(tiny_pae: PAE, tiny_dit: LightningDiT, monkeypatch: pytest.MonkeyPatch) -> Studio:
    monkeypatch.setattr(module, "load_perceptual", lambda _: load_perceptual("random"))
    return Studio(tiny_pae, tiny_dit, {0: "boxes", 1: "discs"})


def test_a_picture_is_upright_on_white_and_cropped(tmp_path: Path) -> None:
    wide = Image.new("RGB", (80, 40), "blue")
    wide.paste("red", (0, 0, 80, 20))
    turned = Image.Exif()
    turned[0x0112] = 3  # shown upside down
    wide.save(tmp_path / "turned.png", exif=turned)
    x = as_pixels(tmp_path / "turned.png", 32)
    assert x.shape == (3, 32, 32)
    assert x[:, 2, 16].tolist() == [0, 0, 1]
    assert x[:, 29, 16].tolist() == [1, 0, 0]
    for mode in ("RGBA", "LA"):
        assert as_pixels(Image.new(mode, (40, 40), 0), 32).min() == 1  # transparent is white
    for mode in ("1", "L", "P", "CMYK", "I;16"):
        assert as_pixels(Image.new(mode, (9, 70)), (32, 48)).shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (None, "there is no picture"),
        (Image.new("RGB", (500, 1)), "more than 100 to 1"),
        (Path(__file__), "cannot be decoded: no known image format"),
    ],
    ids=["none", "thin", "text"],
)
def test_what_is_no_picture_is_refused(picture: module.Picture, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        as_pixels(picture, 32)


def test_encode_shows_the_picture_its_decode_and_both_maps(studio: Studio) -> None:
    result = studio.encode(drawn_face(), segments=3)
    assert [picture.size for picture in result.pictures] == [(256, 256)] * 5
    assert re.search(
        r"PSNR \d+\.\d dB.*SSC\*\* [01]\.\d\d.* [23] groups.*LPC\*\* \d\.\d{3}", result.text, re.S
    )


def test_a_picture_of_one_colour_has_no_ssc(studio: Studio) -> None:
    assert "is not defined here" in studio.encode(Image.new("RGB", (64, 64), "teal")).text


def test_a_move_by_zero_changes_nothing_and_90_degrees_leaves_nothing(studio: Studio) -> None:
    start, here, strip, text = studio.move(drawn_face(), 0.0, seed=1)
    assert start.tobytes() == here.tobytes()
    assert "LPIPS between the two decodes is **0.000**" in text
    assert strip.width > strip.height * (len(ANGLES) - 1)
    _, face, _, text = studio.move(drawn_face(), 90.0, seed=1)
    _, house, _, _ = studio.move(drawn_house(), 90.0, seed=1)
    assert "makes 100 % of that change" in text
    assert face.tobytes() != start.tobytes()
    distance = torch.tensor(list(face.tobytes())).float() - torch.tensor(list(house.tobytes())).float()
    assert distance.abs().max() <= 2  # only the direction is left, up to 0.01 degrees
    _, other, _, _ = studio.move(drawn_face(), 90.0, seed=2)
    assert other.tobytes() != face.tobytes()


def test_a_walk_between_pictures_has_its_decodes_at_the_ends(studio: Studio) -> None:
    strip, text = studio.between_pictures(drawn_face(), drawn_house(), frames=3)
    first, middle, last = (strip.crop((132 * i, 0, 132 * i + 128, 128)).tobytes() for i in range(3))
    assert first != middle != last
    again, _ = studio.between_pictures(drawn_house(), drawn_face(), frames=3)
    assert again.crop((264, 0, 392, 128)).tobytes() == first
    ends, largest, mean = (float(value) for value in re.findall(r"\d\.\d{3}", text))
    assert 0 < mean <= largest
    assert ends > 0


def test_samples_depend_on_class_and_seed(studio: Studio) -> None:
    one, text = studio.generate("discs", count=5, steps=2, guidance=1.0)
    assert text == "5 samples of discs: 2 steps, no guidance."
    assert one.size == (4 * 128 + 3 * 4, 2 * 128 + 4)
    for other in (
        studio.generate("boxes", count=5, steps=2, guidance=1.0),
        studio.generate("discs", count=5, steps=2, guidance=1.0, seed=1),
        studio.generate("discs", count=5, steps=2, guidance=3.0),
    ):
        assert other[0].tobytes() != one.tobytes()


def test_seeds_end_at_their_samples(studio: Studio) -> None:
    strip, text = studio.between_seeds("boxes", (3, 4), frames=3, steps=2)
    alone, _ = studio.between_seeds("boxes", (3, 3), frames=3, steps=2)
    assert strip.size == alone.size
    assert strip.crop((0, 0, 128, 128)).tobytes() == alone.crop((0, 0, 128, 128)).tobytes()
    assert strip.tobytes() != alone.tobytes()
    assert "from frame" in text


WRONG: dict[str, tuple[Callable[[Studio], object], str]] = {
    "angle": (lambda s: s.move(drawn_face(), 91.0), r"\[0, 90\] degrees, got 91"),
    "class": (lambda s: s.generate("cats"), "unknown class 'cats'; known: boxes, discs"),
    "seed": (lambda s: s.generate("discs", seed=-1), "an integer >= 0, got -1"),
    "frames": (lambda s: s.between_pictures(drawn_face(), drawn_face(), 1), "frames must be at least 2"),
    "steps": (lambda s: s.generate("discs", steps=0), "steps must be >= 1, got 0"),
    "generator": (lambda s: replace(s, generator=None).generate("discs"), "there is no generator"),
}


@pytest.mark.parametrize(("call", "text"), WRONG.values(), ids=WRONG)
def test_errors_say_what_is_allowed(studio: Studio, call: Callable[[Studio], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(studio)


def test_colours_become_at_most_as_many_segments() -> None:
    x = torch.zeros(3, 4, 6)
    x[0, :, 3:] = 1
    labels = colour_segments(x, 5)
    assert labels.shape == (4, 6)
    assert len(labels[:, :3].unique()) == len(labels[:, 3:].unique()) == 1
    assert len(labels.unique()) == 2
    assert len(colour_segments(torch.zeros(3, 4, 6), 5).unique()) == 1


def test_classes_get_their_names_from_the_folder(
    tokenizer_folder: Path, tiny_dit: LightningDiT, tmp_path: Path
) -> None:
    made_with = identity_of(tokenizer_folder).fingerprint
    for name, classes in (("plain", None), ("named", (["boxes", "discs"], [0, 4]))):
        (tmp_path / name).mkdir()
        write_generator(tmp_path / name, tiny_dit.state_dict(), tiny_dit.config, made_with, classes)
    cpu = torch.device("cpu")
    assert Studio.load(tokenizer_folder, None, cpu).generator is None
    assert Studio.load(tokenizer_folder, tmp_path / "plain", cpu).classes == {0: "class 0", 1: "class 1"}
    emoji = Studio.load(tokenizer_folder, tmp_path / "plain", cpu, emoji=True)
    assert emoji.classes[0] == "Smileys & Emotion"
    assert Studio.load(tokenizer_folder, tmp_path / "named", cpu).classes == {1: "discs"}
