"""The section of a page that shows adversarial images beside clean ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from torch import Tensor

from ..pipeline.examples import Example, examples
from ..pipeline.extras import optional
from .of_runs import titled
from .page import Picture, Pictures, Section
from .records import Run


def pictures(runs: Sequence[Run]) -> Section:
    """The first test images, attacked images and what the attack changed. Where the data cannot be opened, the section says why."""
    section = Section("images", "Adversarial images")
    for run in runs:
        try:
            found = examples(run.path)
        except (ValueError, OSError, ImportError) as error:
            section.text += f"There are no images of {run.name}: {error}. "
            continue
        title = titled(runs, run, f"attack on the {run.rows[-1]['model']} model, {run.results['attack']}")
        section.pictures.append(Pictures(title, [_shown(example) for example in found]))
    if section.pictures:
        section.text += (
            "The first test images as they are, after the attack, and the difference of the two, enlarged so that the largest change of "
            "the image is black or white and grey means none."
        )
    return section


def _shown(example: Example) -> list[Picture]:
    change = example.attacked - example.clean
    largest = float(change.abs().max())
    grey = 0.5 + (change / (2 * largest) if largest > 0 else change)
    return [
        Picture(_png(example.clean), f"A test image of the class {example.label}", f"{example.label}: seen as {example.seen}"),
        Picture(_png(example.attacked), "The same image after the attack", f"attacked: seen as {example.seen_attacked}"),
        Picture(_png(grey), "The change that the attack has made, enlarged", f"change, up to {largest:.3g}"),
    ]


def _png(image: Tensor) -> str:
    """An image [C, H, W] in [0, 1] with one or three channels as a ``data:`` address."""
    pixels = (image.clamp(0, 1) * 255).round().byte()
    array = pixels[0].numpy() if len(pixels) != 3 else pixels.permute(1, 2, 0).contiguous().numpy()
    written = io.BytesIO()
    optional("PIL.Image").fromarray(array).save(written, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
