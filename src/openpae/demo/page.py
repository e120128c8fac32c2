"""The page of `pae demo`: layout only; `studio` computes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: Gradio then calls nobody

import gradio as gr
from PIL import Image

from openpae.demo.inputs import drawn_face, drawn_house
from openpae.demo.studio import ANGLES, Studio
from openpae.runtime.escape import one_line

_FONT = ["system-ui", "sans-serif"]
THEME = gr.themes.Default(font=_FONT, font_mono=["ui-monospace", "monospace"])
"""Fonts of the machine: the page loads nothing from other sites."""
CSS = """
.gradio-container {max-width: 60rem !important; margin: auto}
footer {display: none !important}
.shown label[data-testid="block-label"] {position: static; border: 0}  /* above the picture, not over it */
.tab-wrapper {contain: inline-size}  /* the tabs must not widen a narrow page */
"""


def build(studio: Studio) -> gr.Blocks:
    """The page for a tokenizer, and for its generator if there is one. `launch` it with `THEME` and `CSS`."""
    with gr.Blocks(title="openpae demo", analytics_enabled=False) as page:
        c, h, w = studio.tokenizer.config.latent_shape
        height, width = studio.tokenizer.config.image_shape
        gr.Markdown(
            "# Walk through a latent space\n\n"
            f"This tokenizer turns a picture of {width} x {height} pixels into a latent: a grid of {w} x {h} "
            f"tokens with {c} numbers each. A decoder turns the latent back into a picture. The paper asks "
            "for a latent space in which regions stay together (**SSC**) and small moves change little "
            "(**LPC**). The numbers on this page say how far this model does that."
        )
        picture = _picture_inputs()
        with gr.Tab("Encode"):
            _encode_tab(page, studio, picture)
        with gr.Tab("Move"):
            _move_tab(page, studio, picture)
        with gr.Tab("Between pictures"):
            _pictures_tab(page, studio, picture)
        if studio.generator is not None:
            with gr.Tab("Generate"):
                _generate_tab(page, studio)
            with gr.Tab("Between seeds"):
                _seeds_tab(page, studio)
    return page


def _picture_inputs() -> gr.State:
    """The two ways to give a picture; the state holds the newest."""
    chosen = gr.State(drawn_face())
    with gr.Accordion("Your picture", open=True), gr.Row():
        given = gr.Image(
            drawn_face(),
            label="Choose a file",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=260,
            elem_id="given",
            min_width=270,
            buttons=[],
        )
        with gr.Column(min_width=270):
            drawing = gr.Sketchpad(
                label="Or draw one",
                type="pil",
                canvas_size=(200, 200),
                brush=gr.Brush(default_size=10),
                height=320,
                layers=False,
                elem_id="drawing",
                buttons=[],
            )
            use = gr.Button("Use the drawing", elem_id="use")
    given.input(lambda file: file, given, chosen, show_progress="hidden")
    use.click(_call(_composite), drawing, chosen)
    return chosen


def _composite(drawing: dict[str, Any] | None) -> Image.Image:
    image = (drawing or {}).get("composite")
    if not isinstance(image, Image.Image) or (
        image.mode == "RGBA" and image.getchannel("A").getbbox() is None
    ):
        raise ValueError("the drawing is empty: draw something first")
    return image


def _encode_tab(page: gr.Blocks, studio: Studio, picture: gr.State) -> None:
    gr.Markdown(
        "The first three components of the latent are shown as red, green and blue. Equal colours mean "
        "similar tokens. SSC compares the last two maps: groups of similar colour in the picture, and "
        "clusters of the latent's tokens."
    )
    segments = gr.Slider(2, 8, 4, step=1, label="Groups of colour in the picture", elem_id="segments")
    names = ("Picture", "Decode", "Latent as colours", "Colour groups", "Clusters of the latent")
    with gr.Row():
        shown = [_output(name, f"encode-{i}") for i, name in enumerate(names)]
    text = gr.Markdown(elem_id="encode-text")

    def run(given: Any, count: float) -> list[Any]:
        result = studio.encode(given, int(count))
        return [*result.pictures, result.text]

    _live(page, run, [picture, segments], [*shown, text])


def _move_tab(page: gr.Blocks, studio: Studio, picture: gr.State) -> None:
    gr.Markdown(
        "The latent moves on its sphere in a random direction. The paper trains with such moves of 42.5 and "
        "85 degrees (MCR), so that their decodes stay alike. Whether this model does it, the pictures and "
        "the number below say."
    )
    angle = gr.Slider(0, 90, 42.5, step=0.5, label="Angle in degrees", elem_id="angle")
    seed = gr.Number(0, label="Seed of the direction", precision=0, minimum=0, elem_id="direction")
    with gr.Row():
        shown = [_output("Decode", "move-0"), _output("Decode of the moved latent", "move-1")]
    text = gr.Markdown(elem_id="move-text")
    strip = _output(f"The same direction at {', '.join(f'{one:g}' for one in ANGLES)} degrees", "move-strip")

    def run(given: Any, degrees: float, number: float) -> list[Any]:
        start, here, row, said = studio.move(given, degrees, int(number))
        return [start, here, row, said]

    _live(page, run, [picture, angle, seed], [*shown, strip, text])


def _pictures_tab(page: gr.Blocks, studio: Studio, picture: gr.State) -> None:
    gr.Markdown(
        "The latents between your picture and a second one, at equal angles. In a smooth space no step is "
        "much larger than the others."
    )
    last = gr.Image(
        drawn_house(),
        label="Second picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=200,
        elem_id="second",
        buttons=[],
    )
    frames = gr.Slider(3, 12, 7, step=1, label="Frames", elem_id="frames")
    strip = _output("From the first to the second picture", "between")
    text = gr.Markdown(elem_id="between-text")
    _live(page, studio.between_pictures, [picture, last, frames], [strip, text])


def _generate_tab(page: gr.Blocks, studio: Studio) -> None:
    gr.Markdown(
        "The generator turns noise into latents of a class, and the tokenizer decodes them. Guidance 1 is "
        "off; higher values push samples towards the class. More steps follow the path more exactly."
    )
    name, steps, guidance = _sampling_inputs(studio, "generate")
    with gr.Row():
        count = gr.Slider(1, 12, 4, step=1, label="Samples", elem_id="count")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
    grid = _output("Samples", "generated")
    text = gr.Markdown(elem_id="generated-text")
    _live(page, studio.generate, [name, count, steps, guidance, seed], [grid, text])


def _seeds_tab(page: gr.Blocks, studio: Studio) -> None:
    gr.Markdown("The noise moves from one seed to another at equal angles; each frame is a sample from it.")
    name, steps, guidance = _sampling_inputs(studio, "seeds")
    with gr.Row():
        first = gr.Number(0, label="First seed", precision=0, minimum=0, elem_id="first-seed")
        last = gr.Number(1, label="Second seed", precision=0, minimum=0, elem_id="last-seed")
        frames = gr.Slider(3, 12, 7, step=1, label="Frames", elem_id="seed-frames")
    strip = _output("From the first to the second seed", "seeds")
    text = gr.Markdown(elem_id="seeds-text")

    def run(chosen: str, a: float, b: float, count: float, many: float, scale: float) -> tuple[Any, str]:
        return studio.between_seeds(chosen, (int(a), int(b)), int(count), int(many), scale)

    _live(page, run, [name, first, last, frames, steps, guidance], [strip, text])


def _sampling_inputs(studio: Studio, prefix: str) -> tuple[gr.Dropdown, gr.Slider, gr.Slider]:
    names = list(studio.classes.values())
    with gr.Row():
        return (
            gr.Dropdown(names, value=names[0], label="Class", elem_id=f"{prefix}-class"),
            gr.Slider(2, 60, 20, step=1, label="Steps", elem_id=f"{prefix}-steps"),
            gr.Slider(1, 5, 2, step=0.1, label="Guidance", elem_id=f"{prefix}-guidance"),
        )


def _output(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        elem_id=name,
        elem_classes=["shown"],
        buttons=["fullscreen"],
        min_width=140,
    )


def _live(page: gr.Blocks, function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Run at the start and after every change of an input; a newer change ends the wait for an older one."""
    safe = _call(function)
    gr.on(
        [page.load, *(one.change for one in inputs)],
        safe,
        inputs,
        outputs,
        trigger_mode="always_last",
        show_progress="minimal",
        api_visibility="private",
    )


def _call(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its errors as one line on the page."""

    @functools.wraps(function)
    def safe(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(one_line(error), print_exception=False) from None

    return safe
