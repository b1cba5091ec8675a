"""Every kind of file that a user might point at."""

import numpy as np
import pytest
import torch
from PIL import Image

from coda_fast.images import ImageError, read_image, resize

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def _save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_colour(tmp_path):
    tensor = read_image(_save(tmp_path / "a.png", COLOUR))
    assert tensor.dtype == torch.float32
    assert np.array_equal(tensor.numpy(), (COLOUR.transpose(2, 0, 1) / 255).astype(np.float32))


def test_grey_serves_as_both(tmp_path):
    path = _save(tmp_path / "a.png", GREY)
    assert torch.equal(read_image(path, 1).expand(3, -1, -1), read_image(path, 3))
    equal_channels = _save(tmp_path / "b.png", np.repeat(GREY[..., None], 3, 2))
    assert torch.equal(read_image(equal_channels, 1), read_image(path, 1))


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "L", "RGBA", "LA"])
def test_modes(tmp_path, mode):
    """Palettes, print colours, opaque alpha: read as what they show."""
    path = _save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), COLOUR, mode)
    expected = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(read_image(path, 3).numpy(), expected, atol=1e-6)


def test_sixteen_bits(tmp_path):
    deep = np.random.default_rng(1).integers(0, 65536, (4, 4), dtype=np.uint16)
    path = _save(tmp_path / "a.png", deep)
    assert np.allclose(read_image(path, 1)[0].numpy(), deep / 65535, atol=1e-6)


def test_float_tiff(tmp_path):
    path = _save(tmp_path / "a.tif", np.random.default_rng(1).random((4, 4), dtype=np.float32))
    assert read_image(path, 1).shape == (1, 4, 4)


def test_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    path = _save(tmp_path / "a.png", COLOUR, exif=exif)
    assert read_image(path).shape == (3, 7, 5)


def _nan(path):
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[1, 2] = np.nan
    _save(path, pixels)


def _truncated(path):
    _save(path, np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:2000])


def _transparent(path):
    _save(path, np.dstack([COLOUR, np.full((5, 7), 128, np.uint8)]))


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
        ("a.tif", lambda p: _save(p, np.full((2, 2), 200, np.float32)), 1, r"expected floating-point pixels in \[0, 1\], got 200"),
        ("a.tif", lambda p: _save(p, np.full((2, 2), 70_000, np.int32)), 1, "at most 16 bits"),
        ("a.png", lambda p: _save(p, COLOUR), 1, r"expected a grey image \(1 channel\), got a colour image \(3 channels\)"),
        ("a.png", _transparent, 3, "got transparent pixels"),
        ("a.png", lambda p: _save(p, COLOUR), 4, "the model expects 4"),
    ],
)
def test_refuses(tmp_path, name, write, channels, message):
    write(tmp_path / name)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(tmp_path / name, channels)
    assert "\n" not in str(caught.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="too large"):
        read_image(_save(tmp_path / "a.png", COLOUR))


def test_resize():
    image = torch.rand(3, 20, 40)
    assert resize(image, 10).shape == (3, 10, 20)
    assert resize(image, 20) is image
    assert resize(torch.full((1, 30, 30), 0.3), 7).allclose(torch.tensor(0.3), atol=1e-6)
    assert resize(torch.rand(1, 1, 50), 1).shape == (1, 1, 50)


def test_resize_makes_no_more_than_it_should():
    """A strip grows to 256 times as long as wide at most, and nothing to more than MOST_PIXELS; shrinking is free, and so is size 0."""
    assert resize(torch.rand(1, 1, 256), 8).shape == (1, 8, 2048)
    with pytest.raises(ImageError, match="strip: expected an image at most 256 times as long as wide to enlarge .* 8 pixels, got 257 x 1"):
        resize(torch.rand(1, 1, 257), 8, "strip")
    assert resize(torch.rand(1, 10, 20_000), 5).shape == (1, 5, 10_000)
    with pytest.raises(ImageError, match="100 x 100 pixels scaled to 10000: too large: expected 1 to 89,478,485 pixels, got 10000 x 10000"):
        resize(torch.rand(1, 100, 100), 10_000)
    for size in (10**12, 10**400):
        with pytest.raises(ImageError, match="expected a size of at most 89478485 pixels"):
            resize(torch.rand(1, 100, 100), size)


def test_too_many_pixels_whatever_pillow_allows(tmp_path, monkeypatch):
    """Of a file whose header says so, before anything is decoded."""
    path = tmp_path / "a.bmp"
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[18:26] = (30_000).to_bytes(4, "little") * 2
    path.write_bytes(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="a.bmp: too large: expected 1 to 89,478,485 pixels, got 30000 x 30000"):
        read_image(path)


def test_programs_are_no_images(tmp_path):
    """Pillow has Ghostscript run what is PostScript, by whatever name."""
    Image.fromarray(COLOUR).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a.png: not an image that Pillow can read"):
        read_image(tmp_path / "a.png")
