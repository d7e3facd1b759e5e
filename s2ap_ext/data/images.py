"""Encoded images as pixels of 8 bits."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from .._extras import optional

# Pillow's modes. Those of other images, such as I and F with 32 bits, say nothing of the value that stands for white.
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
GREY = ("1", "L", "LA", *GREY_16)
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class _Refused(Exception):
    """Why an image that can be read is not taken."""


def decode(data: bytes | None, shape: tuple[int, int, int] | None, where: str) -> np.ndarray:
    """The pixels of an encoded image (PNG, JPEG, ...), uint8 [H, W, C] with C = 1 (grey) or 3 (all others).

    Grey pixels of 16 bits are rounded to 8; of coloured ones Pillow gives the upper 8 bits. An alpha channel or a transparent colour is
    dropped if it hides nothing.

    Args:
        data: the file's bytes.
        shape: the (C, H, W) that the image must have; None takes any. What its header says is checked before anything is decoded.
        where: file and row, for messages.

    Raises:
        ValueError: no bytes, or bytes that are no image; an image of another shape or of a size that Pillow takes for an attack; one with
            transparent pixels, which have no colour of their own; one whose pixels have no fixed range. The message starts with ``where``.
        ImportError: Pillow is missing.
    """
    pil = optional("PIL.Image")
    if data is None:
        raise ValueError(f"{where}: expected the bytes of an image, got none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(io.BytesIO(data)) as image:
                return _pixels(image, shape)
    except _Refused as why:
        raise ValueError(f"{where}: {why}") from None
    except Exception as error:  # whatever a broken file brings a decoder to
        raise ValueError(f"{where}: not a readable image ({error})") from error


def _pixels(image: Any, shape: tuple[int, int, int] | None) -> np.ndarray:
    if image.mode not in GREY + COLOUR:
        raise _Refused(f"expected pixels of 8 bits, or grey ones of 16, since others have no fixed range; got PIL's mode {image.mode}")
    channels = 1 if image.mode in GREY else 3
    found = (channels, image.height, image.width)
    if shape is not None and found != tuple(shape):
        raise _Refused(f"expected an image of shape (C, H, W) = {tuple(shape)}, got one of {found}")
    transparent = _Refused("expected an opaque image, got one with transparent pixels")
    if image.mode in GREY_16:
        wide = np.asarray(image).astype(np.uint32)
        if (wide == image.info.get("transparency", -1)).any():
            raise transparent
        return ((wide + 128) // 257).astype(np.uint8)[:, :, None]  # 65535 = 255 * 257
    if image.has_transparency_data:
        image = image.convert("LA" if channels == 1 else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise transparent
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)
