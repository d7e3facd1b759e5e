"""Encoded images as pixels of 8 bits, as they are or cut out and scaled to one size."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._extras import optional

# Pillow's modes. Those of other images, such as I and F with 32 bits, say nothing of the value that stands for white.
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
GREY = ("1", "L", "LA", *GREY_16)
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


Box = tuple[float, float, float, float]  # left, top, right, bottom


class _Refused(Exception):
    """Why an image that can be read is not taken."""


@dataclass(frozen=True)
class Fit:
    """How images of any size become ``size`` x ``size`` pixels with three channels.

    For testing the shorter side is scaled to ``resize`` pixels and the middle cut out. For training a random part of the image is cut out,
    ``scale`` to 1 of its area and 3/4 to 4/3 as wide as high, and scaled.

    Attributes:
        size: height and width of the result.
        resize: what the shorter side is scaled to before the middle is cut out; at least ``size``.
        scale: the smallest share of the area; 1: training images are cut out as test images are.

    Source: Szegedy et al., arXiv 1409.4842, section 6 (training); He et al., arXiv 1512.03385, section 3.4 (testing).
    """

    size: int
    resize: int
    scale: float = 1.0

    @property
    def is_random(self) -> bool:
        """Whether an image is cut out in another way in each epoch."""
        return self.scale < 1

    def test_box(self, width: int, height: int) -> Box:
        """The part of an image that is cut out for testing."""
        side = min(width, height) * self.size / self.resize
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2

    def training_box(self, width: int, height: int, generator: np.random.Generator) -> Box:
        """A random part of an image. Where none of ten is inside the image, the largest in its middle that is not too wide or high."""
        areas = generator.uniform(self.scale, 1, 10) * width * height
        ratios = np.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3), 10))
        places = generator.uniform(size=(10, 2))
        for w, h, (x, y) in zip(np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios)), places, strict=True):
            if 0 < w <= width and 0 < h <= height:
                left, top = math.floor(x * (width - w + 1)), math.floor(y * (height - h + 1))
                return left, top, left + float(w), top + float(h)
        w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
        return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2

    def apply(self, image: Any, key: tuple[int, ...] | None = None) -> Any:
        """The Pillow image ``image`` in RGB, cut out and scaled (bilinear, with antialiasing): at random as ``key`` says, or the middle."""
        bilinear = optional("PIL.Image").Resampling.BILINEAR
        width, height = image.size
        random = key is not None and self.is_random
        box = self.training_box(width, height, np.random.default_rng(key)) if random else self.test_box(width, height)
        image = image if image.mode == "RGB" else image.convert("RGB")
        return image.resize((self.size, self.size), bilinear, box=box)


def decode(
    data: bytes | None,
    shape: tuple[int, int, int] | None,
    where: str,
    *,
    fit: Fit | None = None,
    key: tuple[int, ...] | None = None,
) -> np.ndarray:
    """The pixels of an encoded image (PNG, JPEG, ...), uint8 [H, W, C] with C = 1 (grey) or 3 (all others).

    Grey pixels of 16 bits are rounded to 8; of coloured ones Pillow gives the upper 8 bits. An alpha channel or a transparent colour is
    dropped if it hides nothing.

    Args:
        data: the file's bytes.
        shape: the (C, H, W) that the image must have; None takes any. What its header says is checked before anything is decoded.
        where: file and row, for messages.
        fit: what brings images of any size to one, in RGB; ``shape`` is then not asked for.
        key: seeds the random part that ``fit`` cuts out; None: the middle.

    Raises:
        ValueError: no bytes, or bytes that are no image; an image of another shape or of a size that Pillow takes for an attack; one with
            transparent pixels, which have no colour of their own; one whose pixels have no fixed range. The message starts with ``where``.
        ImportError: Pillow is missing.
    """
    if data is None:
        raise ValueError(f"{where}: expected the bytes of an image, got none")
    pil = optional("PIL.Image")
    return pixels(lambda: pil.open(io.BytesIO(data)), shape, where, fit=fit, key=key)


def pixels(
    opened: Callable[[], AbstractContextManager[Any]],
    shape: tuple[int, int, int] | None,
    where: str,
    *,
    fit: Fit | None = None,
    key: tuple[int, ...] | None = None,
) -> np.ndarray:
    """As :func:`decode`, of the Pillow image that ``opened`` gives, in a ``with`` that ends with it."""
    pil = optional("PIL.Image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with opened() as image:
                return _pixels(image, shape, fit, key)
    except _Refused as why:
        raise ValueError(f"{where}: {why}") from None
    except Exception as error:  # whatever a broken file brings a decoder to
        raise ValueError(f"{where}: not a readable image ({error})") from error


def _pixels(image: Any, shape: tuple[int, int, int] | None, fit: Fit | None, key: tuple[int, ...] | None) -> np.ndarray:
    if image.mode not in GREY + COLOUR:
        raise _Refused(f"expected pixels of 8 bits, or grey ones of 16, since others have no fixed range; got PIL's mode {image.mode}")
    channels = 1 if image.mode in GREY else 3
    found = (channels, image.height, image.width)
    if fit is None and shape is not None and found != tuple(shape):
        raise _Refused(f"expected an image of shape (C, H, W) = {tuple(shape)}, got one of {found}")
    transparent = _Refused("expected an opaque image, got one with transparent pixels")
    if image.mode in GREY_16:
        wide = np.asarray(image).astype(np.uint32)
        if (wide == image.info.get("transparency", -1)).any():
            raise transparent
        image = optional("PIL.Image").fromarray(((wide + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
    elif image.has_transparency_data:
        image = image.convert("LA" if channels == 1 else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise transparent
    array = np.array(fit.apply(image, key) if fit else image.convert("L" if channels == 1 else "RGB"))
    return array.reshape(*array.shape[:2], -1)
