"""All kinds of image files are decoded by one set of rules (docs/data.md)."""

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import PIL
import pytest
from odd_pictures import UPRIGHT, file_of, turned
from PIL import Image

from coda_fast.data import ImageError, decode

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def save_image(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pixels(source, channels=3, **options):
    return np.asarray(decode(source, channels, **options))


def test_paths_bytes_and_pictures_are_read_alike(tmp_path):
    path = save_image(tmp_path / "a.png", COLOUR)
    with Image.open(path) as lazy:
        found = [
            pixels(path),
            pixels(str(path)),
            pixels(path.read_bytes()),
            pixels(Image.fromarray(COLOUR)),
            pixels(lazy),
        ]
    assert all(np.array_equal(each, COLOUR) and each.dtype == np.uint8 for each in found)


def test_grey_in_colour_and_colour_in_grey(tmp_path):
    """Grey becomes three equal channels. Colour becomes ITU-R 601 luma, rounded to the nearest level."""
    assert np.array_equal(pixels(Image.fromarray(GREY)), np.repeat(GREY[..., None], 3, 2))
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    found = pixels(save_image(tmp_path / "a.png", COLOUR), 1)
    assert found.shape == (5, 7)
    assert abs(found - luma).max() <= 0.51


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "L", "RGBA", "LA", "YCbCr"])
def test_modes(tmp_path, mode):
    """Palettes, print colours and opaque alpha channels are read as the colours that they show."""
    ending, options = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png", {}
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        # Pillow 12.3, the newest that gradio 6 permits, cannot read its own uncompressed file
        options["compression"] = "tiff_deflate"
    path = save_image(tmp_path / ending, COLOUR, mode, **options)
    with Image.open(path) as image:
        assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


def test_colours_by_what_they_are():
    assert pixels(file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))[
        4, 4
    ].tolist() == pytest.approx([255, 0, 0], abs=3)
    palette, other = Image.new("P", (4, 4), 1), Image.new("P", (4, 4), 0)
    for each in (palette, other):
        each.putpalette([255, 0, 0, 0, 200, 0])
    assert pixels(file_of(palette, "PNG"))[0, 0].tolist() == [0, 200, 0]
    # the first picture
    assert pixels(file_of(palette, "GIF", save_all=True, append_images=[other]))[0, 0].tolist() == [0, 200, 0]
    assert pixels(file_of(palette, "PNG", save_all=True, append_images=[other]))[0, 0].tolist() == [0, 200, 0]
    assert pixels(file_of(Image.new("1", (4, 4), 1), "PNG"))[0, 0].tolist() == [255] * 3


# -- transparency: on white
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 1, 128, 255])
def test_transparency_is_flattened_on_white(alpha):
    wanted = [round(255 + (c - 255) * alpha / 255) for c in (10, 100, 250)]
    found = pixels(file_of(Image.new("RGBA", (4, 4), (10, 100, 250, alpha)), "PNG"))
    assert found[2, 2].tolist() == pytest.approx(wanted, abs=1)
    assert pixels(file_of(Image.new("LA", (4, 4), (10, alpha)), "PNG"), 1)[2, 2] == pytest.approx(
        wanted[0], abs=1
    )


def test_one_clear_colour():
    """One transparent colour of a palette, of grey, of colour or of 16 bits, as a PNG names it."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(file_of(palette, "PNG", transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert pixels(file_of(grey, "PNG", transparency=9), 1)[0].tolist() == [7, 255]
    colour = Image.fromarray(np.array([[[7, 8, 9], [1, 2, 3]]], np.uint8))
    assert pixels(file_of(colour, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[7, 8, 9], [255, 255, 255]]
    deep = Image.fromarray(np.array([[257, 1000]], np.uint16))
    assert pixels(file_of(deep, "PNG", transparency=1000), 1)[0].tolist() == [1, 255]


def test_palettes_with_alpha_of_their_own():
    found = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).quantize(4)
    assert pixels(found)[0, 0].tolist() == pixels(file_of(found))[0, 0].tolist() == [255, 255, 255]


def test_colours_under_full_transparency_do_not_matter():
    both = [
        pixels(file_of(Image.new("RGBA", (4, 4), (*colour, 0)), "PNG"))
        for colour in ((255, 0, 0), (0, 0, 255))
    ]
    assert np.array_equal(*both)
    assert both[0].min() == 255


# -- depth
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("format", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("PPM", np.int32)])
def test_grey_of_16_bits_keeps_its_range(format, dtype, channels):
    """16 bits are rounded to the nearest of the 8-bit levels, where level k stands for 257 k. Halves round
    up.
    """
    values = np.arange(256, dtype=dtype).reshape(16, 16) * 257
    for shift, carry in ((0, 0), (128, 0), (129, 1), (-128, 0)):
        shifted = (values.astype(np.int64) + shift).clip(0, 65535)
        expected = (np.arange(256).reshape(16, 16) + carry).clip(0, 255)
        found = pixels(file_of(Image.fromarray(shifted.astype(dtype)), format), channels)
        assert np.array_equal(found if channels == 1 else found[..., 1], expected)


def test_colours_of_16_bits_by_their_upper_8():
    """A PNG written by hand, because Pillow can read but not write it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = (0x1234, 0xABFF, 0xFF00)
    rows = b"\0" + struct.pack(">3H", *values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    found = pixels(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert found.tolist() == [[[0x12, 0xAB, 0xFF]]]


def test_floating_point_from_0_to_1():
    values = np.arange(256, dtype=np.float32).reshape(16, 16) / 255
    assert np.array_equal(pixels(file_of(Image.fromarray(values), "TIFF"), 1), np.arange(256).reshape(16, 16))


# -- orientation
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_upright(orientation, format):
    """An image stored rotated or mirrored, as its EXIF says, is read upright."""
    found = pixels(turned(orientation, format)).astype(int)
    assert found.shape == UPRIGHT.shape
    assert abs(found - UPRIGHT).mean() < (4 if format == "JPEG" else 0.01)
    once = decode(turned(orientation, format))
    assert np.array_equal(pixels(once), pixels(decode(once)))  # an upright image is not rotated again
    with Image.open(io.BytesIO(turned(orientation, format))) as lazy:
        # an image that was converted before is still turned upright
        assert np.array_equal(pixels(lazy), pixels(lazy.convert("RGB")))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"Exif\0\0nothing at all", b""])
def test_exif_that_is_damaged_spoils_no_picture(exif):
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, "JPEG", quality=95, exif=exif)
    assert pixels(buffer.getvalue()).shape == UPRIGHT.shape


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    assert pixels(turned(1, "JPEG", orientation)).shape == UPRIGHT.shape


def test_orientation_beside_damage_in_other_tags():
    """To remove the orientation, Pillow would write all EXIF tags again, and fail."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    data = bytearray(exif.tobytes())
    place = data.find((0x010E).to_bytes(2, "little") if b"II" in data[:12] else (0x010E).to_bytes(2, "big"))
    data[place + 2 : place + 4] = b"\x63\x63"  # a type that does not exist
    stored = np.ascontiguousarray(np.rot90(UPRIGHT, 1))
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "JPEG", quality=95, exif=bytes(data))
    assert abs(pixels(buffer.getvalue()).astype(int) - UPRIGHT).mean() < 4


# -- what cannot be read
# ------------------------------------------------------------------------------------------------------------


def _nan(path):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = np.nan
    save_image(path, values)


def _truncated(path):
    save_image(path, np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "channels", "message"),
    [
        ("a.png", lambda p: None, 3, "a.png: no such file"),
        ("a.png", lambda p: p.mkdir(), 3, "a.png: expected an image file, got a folder"),
        ("a.png", lambda p: p.write_bytes(b""), 3, "a.png: not an image"),
        ("a.png", lambda p: p.write_text("hello"), 3, "a.png: not an image"),
        ("a.png", _truncated, 3, "a.png: damaged or truncated image"),
        ("a.jpg", _truncated, 3, "a.jpg: damaged or truncated image"),
        ("a.tif", _nan, 1, "a.tif: 1 pixels are NaN or infinite"),
        (
            "a.tif",
            lambda p: save_image(p, np.full((2, 2), 200, np.float32)),
            1,
            r"expected floating-point pixels in \[0, 1\], got 200",
        ),
        ("a.tif", lambda p: save_image(p, np.full((2, 2), 70_000, np.int32)), 1, "at most 16 bits"),
        ("a.png", lambda p: save_image(p, COLOUR), 4, "the model expects 4"),
    ],
)
def test_refuses(tmp_path, name, write, channels, message):
    write(tmp_path / name)
    with pytest.raises(ImageError, match=message) as caught:
        decode(tmp_path / name, channels)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # from a worker


def test_bytes_have_the_name_that_they_are_given():
    with pytest.raises(ImageError, match="^shard:7: not an image"):
        decode(b"nothing", name="shard:7")
    with pytest.raises(ImageError, match="^not an image"):
        decode(b"nothing")


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="too large"):
        decode(save_image(tmp_path / "a.png", COLOUR))


def test_too_many_pixels_whatever_pillow_allows(tmp_path, monkeypatch):
    """An image whose header states too many pixels is refused before it is decoded."""
    path = tmp_path / "a.bmp"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[18:26] = (30_000).to_bytes(4, "little") * 2
    path.write_bytes(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(
        ImageError, match="a.bmp: too large: expected 1 to 89,478,485 pixels, got 30000 x 30000"
    ):
        decode(path)


def test_programs_are_no_images(tmp_path):
    """Pillow runs Ghostscript on PostScript files, whatever their name."""
    Image.fromarray(COLOUR).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a.png: not an image that Pillow can read"):
        decode(tmp_path / "a.png")


def test_a_jpeg_is_decoded_smaller_only_where_that_is_asked():
    """Training decodes JPEGs at reduced size for random crops. Evaluation reads every pixel, so that the
    result is the same for a file and for its decoded pixels.
    """
    data = file_of(Image.new("RGB", (800, 600), (9, 99, 199)), "JPEG", quality=95)
    assert decode(data).size == (800, 600)
    assert decode(data, least=300).size == (400, 300)
    assert decode(data, least=301).size == (800, 600)
    assert abs(pixels(data, least=70)[3, 3].astype(int) - (9, 99, 199)).max() <= 2


def test_threads_leave_warnings_as_they_were():
    """Decoding hides Pillow's warnings. Many threads at once must not hide them permanently, nor hide
    warnings of others.
    """
    import threading
    import warnings

    broken = file_of(Image.fromarray(UPRIGHT), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12")
    before = list(warnings.filters)

    def work():
        for _ in range(30):
            decode(broken)
            with contextlib.suppress(ImageError):
                decode(b"nothing")

    threads = [threading.Thread(target=work) for _ in range(8)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == inside
        warnings.warn("still heard", stacklevel=1)
    assert [str(w.message) for w in seen] == ["still heard"]
    assert warnings.filters == before
