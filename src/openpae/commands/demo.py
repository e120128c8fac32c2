"""`pae demo`: walk through a latent space in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from openpae.commands.console import Device


def demo(
    pair: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="PAIR")] = None,
    tokenizer: Path | None = None,
    generator: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    device: Device = "auto",
) -> None:
    """Open a page to encode pictures, move their latents, interpolate, and draw samples.

    Args:
        pair: folder with the subfolders tokenizer and generator, as pae quickstart writes it, or a name such
            as openmoji; by default the pretrained models of the package.
        tokenizer: a tokenizer folder or run folder in place of a pair.
        generator: a generator of that tokenizer's latents; without it the page draws no samples.
        host: address to listen on; 0.0.0.0 for all networks of this machine.
        port: port to listen on.
        share: also open a public link through Gradio's server.
        device: auto uses a GPU if there is one.
    """
    if pair is not None and tokenizer is not None:
        raise ValueError("pae demo takes a PAIR or --tokenizer FOLDER, not both")
    if generator is not None and tokenizer is None:
        raise ValueError("--generator needs --tokenizer, the tokenizer of its latents")
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must lie in [1, 65535], got {port}")
    from openpae.runtime.extras import require

    require("demo", "pae demo", "gradio")
    from openpae.demo.page import CSS, THEME, build
    from openpae.demo.studio import Studio
    from openpae.quickstart.run import PRETRAINED
    from openpae.runtime.device import pick_device

    folder = pair or PRETRAINED
    if tokenizer is None:
        tokenizer, generator = folder / "tokenizer", folder / "generator"
    emoji = tokenizer.parent == PRETRAINED
    studio = Studio.load(tokenizer, generator, pick_device(device), emoji=emoji)
    build(studio).queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, share=share, theme=THEME, css=CSS, ssr_mode=False
    )
