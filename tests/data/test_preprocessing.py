"""Preprocessing of images for a network: equal to torchvision's, and the same for every form in which an
image can be given.
"""

import json

import numpy as np
import pytest
import torch
from odd_pictures import odd_files
from PIL import Image
from torchvision.transforms import v2

import coda_fast
from coda_fast.data import ImageError, Preprocessing
from coda_fast.data.preprocessing import INTERPOLATIONS

GENERATOR = np.random.default_rng(0)


def picture(width, height, channels=3):
    shape = (height, width, 3) if channels == 3 else (height, width)
    return Image.fromarray(GENERATOR.integers(0, 256, shape, dtype=np.uint8))


SIZES = [(500, 375), (375, 500), (300, 300), (960, 240), (240, 241), (20, 30), (3, 2), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "crop"), [(256, 240), (32, 32), (40, None), (33, 7)])
def test_it_is_what_torchvision_does(size, resize, crop):
    """Bit for bit, for images at most four times as long as wide."""
    image = picture(*size)
    steps = [v2.Resize(resize, v2.InterpolationMode.BILINEAR, antialias=True), v2.PILToTensor()]
    expected = v2.Compose(steps if crop is None else [steps[0], v2.CenterCrop(crop), steps[1]])(image)
    assert np.array_equal(Preprocessing(3, resize, crop).pixels(image), expected.numpy())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_interpolations(interpolation):
    image = picture(70, 50)
    found = Preprocessing(3, 30, 20, interpolation).pixels(image)
    mode = v2.InterpolationMode[interpolation.upper()]
    expected = v2.Compose([v2.Resize(30, mode, antialias=True), v2.CenterCrop(20), v2.PILToTensor()])(image)
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_all_forms_of_a_picture_give_the_same(size, channels, tmp_path):
    """A path, bytes, a Pillow image, an array and a tensor of bytes give the same bits. Floating-point input
    differs by the rounding to bytes, twice.
    """
    image, transform = picture(*size), Preprocessing(channels, 36, 32)
    image.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wanted = transform(image)
    assert (wanted.dtype, wanted.shape) == (torch.float32, (channels, 32, 32))
    for form in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        np.array(image),
        pixels,
    ):
        assert torch.equal(transform(form), wanted)
    floating = transform(pixels.double() / 255)
    assert floating.dtype == torch.float64
    assert float((floating - wanted).abs().max()) < 2.1 / 255
    assert transform(pixels.expand(2, 5, *pixels.shape)).shape == (2, 5, channels, 32, 32)
    assert torch.equal(transform(pixels.expand(2, *pixels.shape))[1], wanted)
    assert (
        transform(pixels[None][:0] / 255).shape == transform(pixels[None][:0]).shape == (0, channels, 32, 32)
    )


def test_grey_for_colour_and_colour_for_grey():
    grey = torch.from_numpy(np.array(picture(9, 8, 1)))[None]
    assert torch.equal(Preprocessing(3)(grey), (grey / 255).expand(3, -1, -1))
    assert torch.equal(Preprocessing(3)(grey / 255), (grey / 255).expand(3, -1, -1))
    colour = torch.from_numpy(np.array(picture(9, 8))).permute(2, 0, 1)
    assert float((Preprocessing(1)(colour) - Preprocessing(1)(colour / 255)).abs().max()) < 0.6 / 255


def test_floating_point_can_be_differentiated():
    image = torch.rand(3, 40, 50, requires_grad=True)
    Preprocessing(3, 20, 16)(image).sum().backward()
    assert float(image.grad.sum()) == pytest.approx(3 * 16 * 16, rel=1e-4)


def test_a_picture_as_it_is():
    image = picture(9, 4)
    assert np.array_equal(Preprocessing(3).pixels(image), np.asarray(image).transpose(2, 0, 1))
    assert Preprocessing(3).box(9, 4) == (0, 0, 9, 4)
    assert Preprocessing(3, crop=5) == Preprocessing(3, 5, 5)
    p = Preprocessing(3, 256, 240)
    assert p.at(None) is p
    assert p.at(0) == Preprocessing(3)
    assert p.at(100) == Preprocessing(3, 100, 100)
    assert p.at(100, crop=False) == Preprocessing(3, 100)


# -- where the crop lies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES[:6], (900, 31), (31, 2000)])
@pytest.mark.parametrize(("resize", "crop"), [(64, 64), (80, 64), (64, 10)])
def test_the_box_is_what_the_network_sees(size, resize, crop):
    """Two ramps of brightness show where each pixel of the crop comes from: the centres of its first and last
    pixels lie half a crop pixel inside the box.
    """
    width, height = size
    across = np.broadcast_to(
        np.linspace(0, 1, width, dtype=np.float32) if width > 1 else np.zeros(1, np.float32), (height, width)
    )
    down = np.broadcast_to(
        (np.linspace(0, 1, height, dtype=np.float32) if height > 1 else np.zeros(1, np.float32))[:, None],
        (height, width),
    )
    transform = Preprocessing(3, resize, crop)
    ramps = transform(torch.from_numpy(np.stack([across, down, down])))
    left, top, right, bottom = transform.box(width, height)
    assert right - left == pytest.approx(bottom - top, rel=0.05)
    for start, end, length, values in (
        (left, right, width, ramps[0].mean(0)),
        (top, bottom, height, ramps[1].mean(1)),
    ):
        pixel = (end - start) / crop
        middle = values[crop // 2 - 1 : crop // 2 + 1].mean() * (length - 1) + 0.5
        assert float(middle) == pytest.approx((start + end) / 2, abs=0.02 * length)
        if (
            start > 2 * pixel and end < length - 2 * pixel
        ):  # away from the edges, where antialiasing distorts the ramp
            ends = values[[0, -1]] * (length - 1) + 0.5
            assert ends.tolist() == pytest.approx(
                [start + pixel / 2, end - pixel / 2], abs=max(0.02 * length, pixel / 2)
            )


def test_strips():
    """Of a very long image only the middle is read, without resizing all of it. A whole strip is not enlarged
    without limit.
    """
    strip = np.zeros((2, 40_000, 3), np.uint8)
    strip[:, 19_999:20_001] = 255
    found = Preprocessing(3, 256, 240).pixels(strip)
    assert found.shape == (3, 240, 240)
    assert found[:, 100, 115:125].min() > 200  # two pixels in the middle, 128 wide each
    assert Preprocessing(1, 8).pixels(np.zeros((1, 256), np.uint8)).shape == (1, 8, 2048)
    message = "strip: expected an image at most 256 times as long as wide to enlarge .* 8 pixels, got 257 x 1"
    with pytest.raises(ImageError, match=message):
        Preprocessing(1, 8).pixels(np.zeros((1, 257), np.uint8), "strip")
    assert Preprocessing(1, 5).pixels(np.zeros((10, 20_000), np.uint8)).shape == (1, 5, 10_000)
    with pytest.raises(
        ImageError,
        match="100 x 100 pixels scaled to 10000: too large: expected 1 to 89,478,485 pixels, got "
        "10000 x 10000",
    ):
        Preprocessing(1, 10_000).pixels(np.zeros((100, 100), np.uint8))


def test_odd_files_give_images_of_one_size():
    transform, found = Preprocessing(3, 36, 32), {}
    for name, data in odd_files().items():
        try:
            found[name] = transform(data)
        except ImageError:
            assert name.startswith("broken")
    assert len(found) == len(odd_files()) - 2
    assert {image.shape for image in found.values()} == {(3, 32, 32)}


# -- bad values
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(resize=0), "preprocessing.resize: expected a positive int, at most 65536, got 0"),
        (dict(resize=2**70), "preprocessing.resize: expected a positive int, at most 65536"),
        (dict(crop=True), "preprocessing.crop: expected a positive int"),
        (dict(resize=10, crop=11), "preprocessing.crop: expected at most resize, 10 pixels, got 11"),
        (
            dict(interpolation="random"),
            "preprocessing.interpolation: expected one of bilinear, .* got 'random'",
        ),
        (
            dict(value_range=[-1, 1]),
            r"preprocessing.value_range: expected \[0, 1\], which a CoDA-Net encodes as \[x, 1 - x\]",
        ),
        (dict(size=3), "preprocessing: expected crop, interpolation, resize, value_range, got size"),
    ],
)
def test_values_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        coda_fast.create_model("coda_xs_digits", preprocessing=options)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "picture: expected a path, bytes, a picture of Pillow, an array or a tensor, got int"),
        (
            np.zeros((3, 4)),
            TypeError,
            r"expected an array \[H, W\] or \[H, W, C\] of uint8, got float64 \[3, 4\]",
        ),
        (np.zeros((3, 4, 2), np.uint8), TypeError, r"of uint8, got uint8 \[3, 4, 2\]"),
        (
            torch.zeros(3, 4),
            TypeError,
            r"expected a tensor \[..., C, H, W\], uint8 or floating point, got torch.float32 \[3, 4\]",
        ),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(4, 8, 8), ImageError, r"a picture has 1 or 3 channels, got a tensor \[..., 4, 8, 8\]"),
        ("nowhere.png", ImageError, "nowhere.png: no such file"),
    ],
)
def test_what_is_no_picture(given, error, message):
    with pytest.raises(error, match=message):
        Preprocessing(3, 8, 8)(given)


# -- a part of the model
# ------------------------------------------------------------------------------------------------------------


def test_it_is_part_of_the_model(tmp_path):
    model = coda_fast.create_model(
        "coda_xs_digits", preprocessing=dict(resize=12, crop=10, interpolation="bicubic")
    )
    assert model.transform == Preprocessing(1, 12, 10, "bicubic")
    assert model(model.transform(picture(30, 20))[None]).shape == (1, 10)
    coda_fast.save(model, tmp_path / "a.safetensors")
    found = coda_fast.load(tmp_path / "a.safetensors")
    assert found.transform == model.transform
    assert found.config()["preprocessing"] == {
        "resize": 12,
        "crop": 10,
        "interpolation": "bicubic",
        "value_range": [0.0, 1.0],
    }
    assert coda_fast.load(tmp_path / "a.safetensors", preprocessing=dict(crop=5)).transform == Preprocessing(
        1, 5, 5
    )
    assert coda_fast.load(tmp_path / "a.safetensors", image_size=20).transform == Preprocessing(1, 20, 20)
    model.transform = Preprocessing(1, 9, 9)  # chosen by the user
    coda_fast.save(model, tmp_path / "b.safetensors")
    assert coda_fast.load(tmp_path / "b.safetensors").transform == model.transform
    for other in (torch.nn.Identity(), Preprocessing(3, 9, 9)):
        del model.transform
        model.transform = other
        with pytest.raises(ValueError, match="transform: expected a Preprocessing of 1 channels, got "):
            coda_fast.save(model, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_named_models_say_what_their_pictures_go_through():
    transform = lambda name, **options: coda_fast.create_model(name, device="meta", **options).transform
    assert transform("coda_l_imagenet100") == Preprocessing(3, 256, 240)
    assert transform("coda_l_imagenet100", image_size=64) == Preprocessing(3, 64, 64)
    assert transform("coda_s_cifar10", image_channels=1) == Preprocessing(1, 32, 32)
    assert transform("coda_s_cifar10", image_size=None) == Preprocessing(3)


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"recipe": {"data": {"resize": 24, "size": 16}}}, Preprocessing(1, 24, 16)),
        ({"recipe": {"data": {"resize": None, "size": 16}}}, Preprocessing(1, 16, 16)),
        ({"recipe": {"data": {"resize": None, "size": None}}}, Preprocessing(1, 8, 8)),
        ({"recipe": 3}, Preprocessing(1, 8, 8)),
        ({}, Preprocessing(1, 8, 8)),
    ],
)
def test_files_from_before(tmp_path, metadata, wanted):
    """A file without preprocessing uses that of the recipe of its training, or else the image size of its
    network.
    """
    from safetensors.torch import save_file

    model = coda_fast.create_model("coda_xs_digits")
    config = {key: value for key, value in model.config().items() if key != "preprocessing"}
    header = {
        "format": "coda_fast.CoDANet",
        "coda_fast_version": "0",
        "config": json.dumps(config),
        "metadata": json.dumps(metadata),
    }
    save_file(model.state_dict(), tmp_path / "old.safetensors", header)
    assert coda_fast.load(tmp_path / "old.safetensors").transform == wanted
