"""Every kind of image that Pillow opens, as pixels of 8 bits."""

import io

import numpy as np
import pytest

from s2ap_ext.data.images import decode

Image = pytest.importorskip("PIL.Image")


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(cell):
    return decode(cell, None, "FILE, row 7")


GREY = np.arange(0, 256, 5, dtype=np.uint8)[:48].reshape(6, 8)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
OPAQUE = np.full((6, 8, 1), 255, dtype=np.uint8)


def image_of_mode(mode):
    """An opaque image of ``mode`` as a file, and the pixels that it shows."""
    grey, colour = Image.fromarray(GREY), Image.fromarray(COLOUR)
    if mode == "1":
        return saved(Image.fromarray(GREY > 100)), (GREY > 100)[:, :, None] * np.uint8(255)
    if mode == "L":
        return saved(grey), GREY[:, :, None]
    if mode == "LA":
        return saved(Image.fromarray(np.concatenate([GREY[:, :, None], OPAQUE], axis=2))), GREY[:, :, None]
    if mode == "P":
        palette = colour.quantize(16)
        return saved(palette), np.asarray(palette.convert("RGB"))
    if mode == "PA":
        palette = colour.quantize(16)
        return saved(palette.convert("PA"), "TIFF"), np.asarray(palette.convert("RGB"))
    if mode == "RGB":
        return saved(colour), COLOUR
    if mode == "RGBA":
        return saved(Image.fromarray(np.concatenate([COLOUR, OPAQUE], axis=2))), COLOUR
    if mode == "CMYK":
        return saved(colour.convert("CMYK"), "TIFF"), COLOUR
    assert mode in ("I;16", "I;16B")
    wide = GREY.astype(np.uint16) * 257  # the same shades with 16 bits
    return saved(Image.fromarray(wide.astype(">u2" if mode == "I;16B" else "<u2")), "TIFF" if mode == "I;16B" else "PNG"), GREY[:, :, None]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I;16B"])
def test_image_modes(mode):
    cell, expected = image_of_mode(mode)
    assert Image.open(io.BytesIO(cell)).mode == mode
    np.testing.assert_array_equal(decoded(cell), expected)


def test_16_bits_are_rounded_to_8():
    values = np.array([[0, 128, 129, 385, 386, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    pixels = decoded(saved(Image.fromarray(values)))
    np.testing.assert_array_equal(pixels[0, :, 0], np.round(values[0] / 65535 * 255))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    cell = saved(Image.fromarray(np.array([[0, 70000]], dtype=np.int32 if mode == "I" else np.float32)), "TIFF")
    with pytest.raises(ValueError, match=rf"FILE, row 7: expected pixels of 8 bits, or grey ones of 16, .* got PIL's mode {mode}$"):
        decoded(cell)


def transparent_image(kind):
    alpha = OPAQUE.copy()
    alpha[3, 4] = 254
    if kind == "LA":
        return saved(Image.fromarray(np.concatenate([GREY[:, :, None], alpha], axis=2)))
    if kind == "RGBA":
        return saved(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)))
    if kind == "PA":
        return saved(Image.fromarray(np.concatenate([COLOUR, alpha * 0], axis=2)).convert("PA"), "TIFF")
    if kind == "P":
        return saved(Image.fromarray(COLOUR).quantize(4), transparency=2)
    if kind == "1":
        return saved(Image.fromarray(GREY > 100), transparency=255)
    if kind == "L":
        return saved(Image.fromarray(GREY), transparency=5)
    if kind == "I;16":
        return saved(Image.fromarray(GREY.astype(np.uint16) * 257), transparency=5 * 257)
    return saved(Image.fromarray(COLOUR), transparency=tuple(COLOUR[2, 3].tolist()))


@pytest.mark.parametrize("kind", ["1", "L", "LA", "I;16", "P", "PA", "RGB", "RGBA"])
def test_transparent_images_are_refused(kind):
    with pytest.raises(ValueError, match=r"FILE, row 7: expected an opaque image, got one with transparent pixels"):
        decoded(transparent_image(kind))


@pytest.mark.parametrize(("mode", "key"), [("L", 1), ("I;16", 70), ("RGB", (0, 0, 1))])
def test_a_transparent_colour_that_no_pixel_has_hides_nothing(mode, key):
    pixels = {"L": GREY, "I;16": GREY.astype(np.uint16) * 257, "RGB": COLOUR}[mode]
    shown = COLOUR if mode == "RGB" else GREY[:, :, None]
    np.testing.assert_array_equal(decoded(saved(Image.fromarray(pixels), transparency=key)), shown)
