"""Videos explained: what an independent reading of the written file finds."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

import coda_fast
from coda_fast import cli
from coda_fast.video import explain_video, is_video

TIMES = [0, 10, 20, 40, 50, 90, 100, 110]  # hundredths of a second: the rate varies


@pytest.fixture
def model():
    return coda_fast.create_model("coda_xs_digits", class_names=[f"digit {i}" for i in range(10)]).eval()


def frames_of(path):
    with av.open(str(path)) as container:
        return [(f.to_ndarray(format="rgb24"), round(float(f.time), 3)) for f in container.decode(video=0)]


@pytest.fixture(params=["mp4", "gif"])
def clip(request, tmp_path):
    """A grey square that moves to the right."""
    path = tmp_path / f"clip.{request.param}"
    squares = []
    for i in range(len(TIMES)):
        pixels = np.zeros((32, 48, 3), np.uint8)
        pixels[8:24, 4 * i : 4 * i + 16] = 200
        squares.append(pixels)
    if request.param == "gif":
        durations = [10 * (b - a) for a, b in zip(TIMES, [*TIMES[1:], 120], strict=True)]
        first, *others = map(Image.fromarray, squares)
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for time, pixels in zip(TIMES, squares, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_frames_and_maps(model, clip, tmp_path):
    assert is_video(clip)
    output = tmp_path / f"out{clip.suffix}"
    result = explain_video(model, clip, output, size=0, target=3)
    source, written = frames_of(clip), frames_of(output)
    assert result.frames == len(written) == len(TIMES)
    assert [time for _, time in written] == [time for _, time in source] == [t / 100 for t in TIMES]
    images = torch.stack([torch.from_numpy(f).float().mean(2)[None] / 255 for f, _ in source])
    maps = model.explain(images, 3).contribution_map[:, 0]
    assert result.scale == pytest.approx(float(np.percentile(maps.abs().numpy(), 99.75)), rel=0.02)
    for (picture, _), image, contribution in zip(written, images, maps, strict=True):
        panels = np.delete(picture[4:256:8, 4:776:8].astype(int), 48, 1)  # centres of pixels enlarged 8 times, and of the gap
        colours = colormaps["bwr"]((contribution.numpy() / result.scale).clip(-1, 1) / 2 + 0.5)[..., :3] * 255
        assert abs(panels[:, :48] - image[0].numpy()[..., None] * 255).mean() < 4
        assert abs(panels[:, 48:] - colours).mean() < 6


def test_range_and_crop(model, clip, tmp_path):
    output = tmp_path / f"out{clip.suffix}"
    result = explain_video(model, clip, output, size=0, start=0.2, end=1.0, crop=(8, 0, 32, 32), scale=0.5)
    written, source = frames_of(output), frames_of(clip)[2:6]
    assert (result.frames, result.scale) == (4, 0.5)
    assert [time for _, time in written] == [0, 0.2, 0.3, 0.7]
    for (picture, _), (pixels, _) in zip(written, source, strict=True):
        assert abs(picture[4:256:8, 4:256:8].astype(int) - pixels[:, 8:40]).mean() < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "9"], "no frame from 9 s"),
        (["--start", "soon"], "expected a time"),
        (["--crop", 40, 0, 32, 32], "expected a box inside 48 x 32"),
        (["--target", "cat"], "--target: expected a class"),
        (["--target", 1, "--target", 2], "expected one class for a video"),
        (["--scale", 0], "expected a positive number"),
    ],
    ids=str,
)
def test_refuses(model, clip, tmp_path, capsys, options, message):
    coda_fast.save(model, tmp_path / "net.safetensors")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["explain", clip, "--checkpoint", tmp_path / "net.safetensors", "--output", tmp_path, *options]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"


def test_interrupted(model, clip, tmp_path):
    def stop(frames, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain_video(model, clip, tmp_path / "out.mp4", progress=stop)
    assert list(tmp_path.iterdir()) == [clip]


def test_a_file_cut_off_is_a_warning(model, clip, tmp_path):
    if clip.suffix != ".gif":
        pytest.skip("an MP4 with its index at the end cannot be read at all when cut")
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    with pytest.warns(UserWarning, match="after frame"):
        assert 0 < explain_video(model, clip, tmp_path / "out.gif").frames < len(TIMES)
