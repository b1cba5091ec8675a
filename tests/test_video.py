"""Explained videos, checked by reading the written file independently."""

import importlib.util
import itertools
import re
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw

import coda_fast
from coda_fast import cli, video
from coda_fast._video_frames import side_by_side
from coda_fast.video import VideoError, explain_video, is_video

TIMES = [0, 10, 20, 40, 50, 90, 100, 110]  # in hundredths of a second, at a varying rate


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
        # the centres of pixels enlarged 8 times, and of the gap
        panels = np.delete(picture[4:256:8, 4:776:8].astype(int), 48, 1)
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
        (["--start", "2", "--end", "1"], "expected seconds with 0 <= start < end"),
    ],
    ids=str,
)
def test_refuses(model, clip, tmp_path, capsys, options, message):
    coda_fast.save(model, tmp_path / "net.safetensors")
    before = sorted(tmp_path.rglob("*"))
    arguments = [
        "explain",
        clip,
        "--checkpoint",
        tmp_path / "net.safetensors",
        "--output",
        tmp_path,
        *options,
    ]
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


def write_clip(path, frames, rotation=0):
    """Write a video of [H, W, 3] uint8 arrays at ten frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_command(model, clip, tmp_path, capsys):
    """An image and a video on one command line, with the requested format and scale."""
    coda_fast.save(model, tmp_path / "net.safetensors")
    Image.new("L", (16, 16), 90).save(tmp_path / "still.png")
    arguments = [
        "explain",
        tmp_path / "still.png",
        clip,
        "--checkpoint",
        tmp_path / "net.safetensors",
        "--output",
        tmp_path / "a" / "b",
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert not stop.value.code
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        f"clip_explained{clip.suffix}",
        "still_explained.png",
    ]
    arguments = [
        "explain",
        clip,
        *arguments[3:5],
        "--output",
        tmp_path / "c",
        "--format",
        "gif",
        "--scale",
        "0.25",
        "--target",
        "digit 7",
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert not stop.value.code
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.search(
        r"8 frames, digit 7 \(p = 0\.\d\d\d to 0\.\d\d\d\), 8 of them fit none of the classes, explained by "
        r"net\.safetensors, colours to 0\.25 logits",
        line,
    )
    with Image.open(tmp_path / "c" / "clip_explained.gif") as written:
        assert (written.format, written.n_frames) == ("GIF", len(TIMES))


def test_failure_leaves_no_folder(model, clip, tmp_path):
    coda_fast.save(model, tmp_path / "net.safetensors")
    arguments = [
        "explain",
        clip,
        "--checkpoint",
        tmp_path / "net.safetensors",
        "--output",
        tmp_path / "new" / "folder",
        "--start",
        "9",
    ]
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(a) for a in arguments])
    assert not (tmp_path / "new").exists()


def test_without_pyav(model, clip, tmp_path, monkeypatch, capsys):
    coda_fast.save(model, tmp_path / "net.safetensors")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(
            [
                "explain",
                str(clip),
                "--checkpoint",
                str(tmp_path / "net.safetensors"),
                "--output",
                str(tmp_path),
            ]
        )
    assert "coda-fast[video]" in capsys.readouterr().err


def test_progress_counts_all_passes(model, clip, tmp_path):
    calls = []
    explain_video(model, clip, tmp_path / "out.mp4", batch=3, progress=lambda *call: calls.append(call))
    assert sum(frames for frames, _ in calls) == 3 * len(TIMES)
    assert {total for _, total in calls} == {3 * len(TIMES)}


@pytest.mark.parametrize(
    "options", [{"start": -1}, {"end": -1}, {"start": float("nan")}, {"start": 1, "end": 1}], ids=str
)
def test_refuses_times(model, clip, tmp_path, options):
    with pytest.raises(VideoError, match="expected seconds with 0 <= start < end"):
        explain_video(model, clip, tmp_path / "out.mp4", **options)


@pytest.mark.parametrize("options", [{}, {"target": 0}, {"target": 0, "scale": 1.0}], ids=str)
def test_refuses_logits_that_are_not_finite(model, clip, tmp_path, options):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(VideoError, match="not finite"):
        explain_video(model, clip, tmp_path / "out.mp4", **options)
    assert list(tmp_path.iterdir()) == [clip]


def test_colour_where_grey_is_needed(model, tmp_path):
    """Frames are converted to grey as images are."""
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    clip = write_clip(tmp_path / "red.mp4", [red])
    explain_video(model, clip, tmp_path / "out.mp4", size=0)
    ((frame, _),) = frames_of(tmp_path / "out.mp4")
    assert abs(frame[4:252:8, 4:252:8].astype(int) - round(0.299 * 200)).max() <= 6


def test_crops_are_shown(model, tmp_path):
    """By default the network gets the middle, as in training, and the rest is faded on both sides. With
    size=0 it gets whole frames.
    """
    pixels = np.full((32, 64, 3), 40, np.uint8)
    clip = write_clip(tmp_path / "wide.mp4", [pixels] * 2)
    explain_video(model, clip, tmp_path / "out.mp4", target=0)
    frame = frames_of(tmp_path / "out.mp4")[0][0].astype(int)
    assert model.transform.box(64, 32) == (16, 0, 48, 32)
    picture, contributions = frame[:256, :512], frame[:256, 520:1032]
    for panel in (picture, contributions):  # the part that the network did not see
        assert abs(panel[8:248, 8:120] - (150 + 0.4 * 40)).max() <= 8
        assert abs(panel[8:248, 392:504] - (150 + 0.4 * 40)).max() <= 8
    assert abs(picture[8:248, 136:376] - 40).max() <= 8
    image = model.transform(pixels)[None]
    contribution = model.explain(image, 0).contribution_map[0, 0].numpy()
    seen = contributions[16:256:32, 144:384:32]  # the centres of 8 x 8 pixels, enlarged 32 times
    red, blue = seen[..., 0] > seen[..., 2] + 30, seen[..., 2] > seen[..., 0] + 30
    assert ((contribution > 0) | ~red).all()
    assert ((contribution < 0) | ~blue).all()
    assert red.any() or blue.any()


def test_rotation(model, tmp_path):
    """A video stored on its side is shown upright: turned clockwise, the bright edge at the left moves to the
    top.
    """
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :16] = 200
    clip = write_clip(tmp_path / "phone.mp4", [pixels], rotation=-90)  # ffmpeg counts anticlockwise
    explain_video(model, clip, tmp_path / "out.mp4", size=0, target=0)
    picture = frames_of(tmp_path / "out.mp4")[0][0]
    panel = picture[4:384:8, 4:256:8, 0]
    assert panel[:16].mean() > 190
    assert panel[16:].mean() < 10


def test_frames_of_several_sizes(model, tmp_path):
    """Two raw streams of different size, one after the other, are one stream that changes its size."""
    joined = tmp_path / "joined.h264"
    parts = [
        write_clip(tmp_path / f"{side}.h264", [np.full((side, side, 3), 90, np.uint8)] * 3)
        for side in (32, 48)
    ]
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(VideoError, match="frames of one size, got 32 x 32 and, at frame 4, 48 x 48"):
        explain_video(model, joined, tmp_path / "out.mp4", target=0)


def test_long_names_are_shortened(model, clip, tmp_path):
    """The caption ends inside its panel and includes the probability."""
    short = explain_video(model, clip, tmp_path / "short.gif", size=0, crop=(0, 0, 32, 32), target=0)
    model.class_names[0] = "American Staffordshire terrier, Staffordshire bull terrier"
    explain_video(
        model, clip, tmp_path / "long.gif", size=0, crop=(0, 0, 32, 32), target=0, scale=short.scale
    )
    long = frames_of(tmp_path / "long.gif")[0][0][258:]  # below the panels
    assert (long[:, 200:252] < 128).any(), "the caption must fill its panel"
    assert (long[:, 253:264] > 200).all(), "the gap must stay free"


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib_fontja") is None, reason="needs the package with a Japanese font"
)
def test_names_in_several_scripts(monkeypatch):
    """Each part is drawn with the font that has its characters, one after the other. Names are cut by their
    width.
    """
    drawn, whole = [], ImageDraw.ImageDraw.text

    def text(self, xy, piece, fill, font, anchor):
        drawn.append((xy[0], piece, font.getname()[0], font.getlength(piece)))
        return whole(self, xy, piece, fill, font, anchor=anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    for name, pieces in [
        ("cat \u732b", ["cat ", "\u732b", ": p = 0.5"]),
        ("\u732b" * 50, ["\u732b" * 12, "\u2026: p = 0.5"]),
    ]:
        drawn.clear()
        side_by_side(torch.rand(1, 256, 256), torch.zeros(256, 256), 1.0, name, "p = 0.5")
        caption = drawn[: len(pieces)]
        assert [piece for _, piece, *_ in caption] == pieces
        assert [family for _, _, family, _ in caption] == [
            "IPAexGothic" if "\u732b" in piece else "DejaVu Sans" for piece in pieces
        ]
        for (x, _, _, length), (following, *_) in itertools.pairwise(caption):
            assert following == x + length
        assert caption[-1][0] + caption[-1][3] <= 256


def test_one_scale_for_all_frames(model, tmp_path):
    """A frame with small contributions is pale next to one with large contributions."""
    noise = (
        np.random.default_rng(0)
        .integers(0, 2, (8, 8, 1))
        .repeat(4, 0)
        .repeat(4, 1)
        .repeat(3, 2)
        .astype(np.uint8)
        * 255
    )
    clip = write_clip(tmp_path / "clip.mp4", [np.full((32, 32, 3), 128, np.uint8), noise])
    images = torch.stack([torch.from_numpy(f).float().mean(2)[None] / 255 for f, _ in frames_of(clip)])
    maps = model.explain(images, 0).contribution_map.abs()
    peaks, scale = maps.amax((1, 2, 3)), float(np.percentile(maps.numpy(), 99.75))
    weak, strong = peaks.argmin(), peaks.argmax()
    assert peaks[weak] < 0.7 * peaks[strong]
    explain_video(model, clip, tmp_path / "out.gif", size=0, target=0)
    panels = [picture[4:256:8, 268:520:8].astype(int) for picture, _ in frames_of(tmp_path / "out.gif")]
    depth = [255 - panel.min(2).min() for panel in panels]  # white has a depth of 0
    assert depth[strong] > 245
    assert depth[weak] / 255 == pytest.approx(float(peaks[weak]) / scale, abs=0.05)


def test_playlists_open_no_other_files(model, clip, tmp_path, monkeypatch):
    """Playlists are refused, because in ffmpeg they could name any file of this or another machine."""
    first, text = tmp_path / f"first{clip.suffix}", tmp_path / "list.mp4"
    clip.rename(first)
    for playlist in (
        f"ffconcat version 1.0\nfile '{first.name}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{first.name}\n#EXT-X-ENDLIST\n",
    ):
        text.write_text(playlist)
        assert is_video(text)  # judged by its name, so that the message is about a video
        with pytest.raises(VideoError, match="list.mp4: not a video that can be read"):
            explain_video(model, text, tmp_path / "out.mp4")
    text.rename(tmp_path / "list.txt")
    assert not is_video(tmp_path / "list.txt")


def test_frames_of_an_animation_are_not_counted_to_know_it(tmp_path, monkeypatch):
    """Recognising an animation does not count its frames: a GIF may have millions of them."""
    from PIL.GifImagePlugin import GifImageFile

    frames = [Image.new("L", (8, 8), 50 * i) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif")
    monkeypatch.setattr(GifImageFile, "n_frames", property(lambda self: pytest.fail("counted")))
    assert is_video(tmp_path / "a.gif")
    assert not is_video(tmp_path / "b.gif")


def test_frames_that_are_too_large(model, clip, tmp_path, monkeypatch):
    from coda_fast import safety

    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 1 << 19)
    with pytest.raises(
        ValueError, match=f"clip{clip.suffix}: an explanation of 48 x 32 pixels: expected what fits"
    ):
        explain_video(model, clip, tmp_path / "out.mp4", size=0, target=0)
    assert list(tmp_path.iterdir()) == [clip]


def test_large_frames_come_in_smaller_batches(model, clip, tmp_path, monkeypatch):
    from coda_fast import explain

    sizes = []
    whole = explain_video(
        model, clip, tmp_path / "a.gif", size=0, target=0, progress=lambda n, total: sizes.append(n)
    )
    assert sizes == [len(TIMES)] * 2
    sizes.clear()
    monkeypatch.setattr(explain, "MEMORY_BUDGET", 3 << 20)  # three frames of 48 x 32 pixels with this network
    less = explain_video(
        model, clip, tmp_path / "b.gif", size=0, target=0, progress=lambda n, total: sizes.append(n)
    )
    assert 1 < sizes[0] < len(TIMES)
    assert sum(sizes) == 2 * len(TIMES)
    assert less.scale == pytest.approx(whole.scale, rel=0.002)


@pytest.mark.parametrize("ending", ["mp4", "gif", "webm", "mkv", "avi"])
def test_a_full_disk(model, tmp_path, monkeypatch, ending):
    """A full disk at any point, even at the last byte, gives one line and leaves no file. It is simulated by
    a limit on the size of files.
    """
    resource = pytest.importorskip("resource")
    # without contribution maps, whose rounding may differ between explanations and change the size of the
    # video
    monkeypatch.setattr(
        video,
        "side_by_side",
        lambda image, *_: (255 * image[0].numpy()).astype(np.uint8)[..., None].repeat(3, 2),
    )
    frames = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)) for i in range(3)
    ]
    clip, output = tmp_path / "clip.gif", tmp_path / f"out.{ending}"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=100)
    options = dict(size=0, target=3, scale=1.0)
    explain_video(model, clip, output, **options)
    size = output.stat().st_size
    before, rest = resource.getrlimit(resource.RLIMIT_FSIZE), output.read_bytes()
    for limit in (1, size // 2, size - 300, size - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(VideoError, match=f"out.{ending}: cannot be written: File too large"):
                explain_video(model, clip, output, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.gif", output.name]
        assert output.read_bytes() == rest, "the older video must not change"
