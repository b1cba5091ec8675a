"""Explanations of videos and animated GIFs: each frame beside its contribution map, one colour scale for all."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from coda_fast.checkpoints import atomic_path
from coda_fast.images import resize
from coda_fast.plot import COLOURS, probability

PERCENTILE = 99.75  # of absolute contributions over the video, as published
SIDE = 256  # the shorter side of a panel, at least
CAPTION = 24  # pixels below the panels
_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
_BINS, _LOW, _HIGH = 36_000, -12.0, 6.0  # decades; a bin is 0.1 % wide


class VideoError(ValueError):
    """A file or an option that no video can be explained with; the message names the file, what was expected and what was found."""


@dataclasses.dataclass(frozen=True)
class ExplainedVideo:
    """What ``explain_video`` wrote: number of frames, class, end of the colour scale and largest completeness error (both in logits)."""

    frames: int
    target: int
    scale: float
    completeness_error: float


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is an animation for Pillow or, where Pillow cannot read it, a video for PyAV."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.format == "GIF" and image.n_frames > 1
    except UnidentifiedImageError:
        pass
    except Exception:  # a damaged picture: read_image says what is wrong
        return False
    try:
        with _av().open(os.fspath(path)) as container:
            return bool(container.streams.video) and container.format.name != "tty"  # ffmpeg draws any text as a terminal
    except ImportError:
        if Path(path).suffix.lower() in _ENDINGS:
            raise
        return False
    except Exception:  # explain_video or read_image says what is wrong
        return Path(path).suffix.lower() in _ENDINGS


def explain_video(
    model,
    source: str | os.PathLike,
    target_path: str | os.PathLike,
    *,
    target: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    crop: tuple[int, int, int, int] | None = None,
    size: int | None = None,
    scale: float | None = None,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> ExplainedVideo:
    """Write the frames of ``source`` as the network sees them (left) beside their contribution maps (right), without sound.

    The file is decoded once for each thing to find (class, scale) and once to write, so memory does not grow with its length.

    Args:
        target_path: its ending gives the format (.mp4, .gif ...); appears only when complete.
        target: class; None: the one predicted for most frames.
        start, end: seconds from the first frame; ``end`` is excluded.
        crop: x, y, width, height in pixels of the source.
        size: pixels of the shorter side for the network; None: the model's, 0: as it is.
        scale: end of the colour scale in logits; None: the ``PERCENTILE`` of absolute contributions over the video.
        batch: frames explained at once.
        progress: called with the number of frames of each batch of the last pass.

    Raises:
        VideoError: not a video, no frame in the range, a crop outside the frame, a class that does not exist, logits that are not finite.
        ImportError: PyAV or matplotlib is missing. A damaged end is a warning: what could be decoded is explained.
    """
    if target is not None and not 0 <= target < model.num_classes:
        raise VideoError(f"target: expected a class from 0 to {model.num_classes - 1}, got {target}")
    if scale is not None and not 0 < scale < float("inf"):
        raise VideoError(f"scale: expected a positive number, got {scale}")
    size = model.image_size if size is None else size
    # 0.2 s is 1/5, not the binary fraction above it
    start = Fraction(start).limit_denominator(10**6)
    end = None if end is None else Fraction(end).limit_denominator(10**6)
    parameter = next(model.parameters())

    def batches():
        frames = []
        for pixels, time in _frames(source, start, end, crop):
            image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
            image = image.mean(0, keepdim=True) if model.image_channels == 1 else image
            frames.append((resize(image, size) if size else image, time))
            if len(frames) == batch:
                yield frames
                frames = []
        if frames:
            yield frames

    def tensor(frames):
        return torch.stack([image for image, _ in frames]).to(parameter)

    votes = torch.zeros(model.num_classes, dtype=torch.long)
    for frames in batches() if target is None else ():
        with torch.no_grad():
            votes += _finite(model(tensor(frames)), source).argmax(1).bincount(minlength=model.num_classes).cpu()
    if target is None:
        if not votes.sum():
            raise VideoError(f"{source}: no frame from {float(start):g} s to {'the end' if end is None else f'{float(end):g} s'}")
        target = int(votes.argmax())
    if scale is None:
        histogram = torch.zeros(_BINS, dtype=torch.float64)
        for frames in batches():
            maps = model.explain(tensor(frames), target).contribution_map.abs().double().cpu()
            histogram += torch.histc(maps.clamp(10**_LOW, 10**_HIGH * 0.999).log10(), _BINS, _LOW, _HIGH)
        index = int(torch.searchsorted(histogram.cumsum(0), histogram.sum() * PERCENTILE / 100))
        scale = 10 ** (_LOW + (min(index, _BINS - 1) + 1) * (_HIGH - _LOW) / _BINS)

    name = model.class_names[target] if model.class_names else f"class {target}"
    count, worst = 0, 0.0
    with atomic_path(target_path) as temporary:
        writer = _Writer(temporary, _rate(source))
        try:
            for frames in batches():
                explanation = model.explain(tensor(frames), target)
                sure = _finite(explanation.logits, source)[:, target].sigmoid().tolist()
                worst = max(worst, float(explanation.completeness_error.max()))
                for (image, time), contribution, p in zip(frames, explanation.contribution_map[:, 0].cpu(), sure, strict=True):
                    writer.write(_picture(image, contribution, scale, f"{name}: {probability(p)}"), time)
                count += len(frames)
                if progress:
                    progress(len(frames))
            if not count:
                raise VideoError(f"{source}: no frame from {float(start):g} s to {'the end' if end is None else f'{float(end):g} s'}")
            writer.finish()
        finally:
            writer.close()
    return ExplainedVideo(count, target, scale, worst)


def _av():
    try:
        import av
    except ImportError:
        raise ImportError("videos need PyAV: pip install 'coda-fast[video]'") from None
    return av


def _finite(logits, source):
    if not torch.isfinite(logits).all():
        raise VideoError(f"{source}: the network gives logits that are not finite")
    return logits


def _rate(source):
    with _av().open(os.fspath(source)) as container:
        return container.streams.video[0].average_rate or Fraction(25)


def _frames(source, start, end, crop) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Frames [H, W, 3] in the range with their times from the first frame written."""
    av = _av()
    if not Path(source).exists():
        raise VideoError(f"{source}: no such file")
    number, zero, first = 0, None, None
    try:
        with av.open(os.fspath(source)) as container:
            if not container.streams.video:
                raise VideoError(f"{source}: expected a video, got a file without pictures")
            stream = container.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            for frame in container.decode(stream):
                time = frame.pts * frame.time_base if frame.pts is not None else number / rate
                zero = time if zero is None else zero
                number += 1
                time -= zero
                if time < start:
                    continue
                if end is not None and time >= end:
                    break
                if crop is not None:
                    x, y, w, h = crop
                    if min(x, y) < 0 or min(w, h) < 1 or x + w > frame.width or y + h > frame.height:
                        raise VideoError(
                            f"{source}: crop: expected a box inside {frame.width} x {frame.height} pixels, got {x} {y} {w} {h}"
                        )
                pixels = frame.to_ndarray(format="rgb24")
                first = time if first is None else first
                yield pixels if crop is None else np.ascontiguousarray(pixels[y : y + h, x : x + w]), time - first
            else:  # ffmpeg ends a file that was cut off without an error
                if number < stream.frames or (
                    container.format.name == "gif" and not Path(source).read_bytes().rstrip(b"\0").endswith(b";")
                ):
                    warnings.warn(f"{source}: cut off after frame {number}; the readable part is explained", stacklevel=2)
    except av.FFmpegError as error:
        if not number:
            raise VideoError(f"{source}: not a video that can be read: {error.strerror}") from None
        warnings.warn(f"{source}: damaged after frame {number}; the readable part is explained", stacklevel=2)


def _picture(image, contribution, scale, caption):
    """[H, W, 3] uint8, even sides: frame, map, and one line of text."""
    from matplotlib import colormaps
    from PIL import Image, ImageDraw, ImageFont

    left = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    unit = (contribution.float().numpy() / scale).clip(-1, 1) / 2 + 0.5
    right = colormaps[COLOURS](unit, bytes=True)[..., :3]
    factor = max(1, -(-SIDE // min(left.shape[:2])))
    left, right = (panel.repeat(factor, 0).repeat(factor, 1) for panel in (left, right))
    panels = np.concatenate((left, right), 1)
    height, width = panels.shape[:2]
    canvas = Image.new("RGB", (width + width % 2, height + CAPTION + height % 2), "white")  # 4:2:0 needs even sides
    canvas.paste(Image.fromarray(panels), (0, 0))
    ImageDraw.Draw(canvas).text((6, height + 3), caption, "black", ImageFont.load_default(15))
    return np.asarray(canvas)


class _Writer:
    """Frames with their times into a file; GIFs through a palette for each frame, so that no frame has to wait for the last."""

    def __init__(self, path, rate):
        self.av, self.rate, self.stream, self.graph = _av(), rate, None, None
        self.gif = path.suffix.lower() == ".gif"
        self.base = Fraction(1, 100) if self.gif else Fraction(1, 90_000)
        try:
            self.container = self.av.open(os.fspath(path), "w")
        except (self.av.FFmpegError, ValueError):
            raise VideoError(f"{path.suffix}: expected the ending of a video format, such as .mp4 or .gif") from None

    def write(self, pixels, time):
        frame = self.av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = round(time / self.base), self.base
        if self.stream is None:
            self._begin(frame)
        if self.graph is None:
            self.container.mux(self.stream.encode(frame))
            return
        self.graph.push(frame)
        self._drain()

    def _begin(self, frame):
        codec = "gif" if self.gif else "libvpx-vp9" if self.container.format.name == "webm" else "libx264"
        options = {} if self.gif else {"crf": "16"}
        self.stream = self.container.add_stream(codec, rate=self.rate, options=options)
        self.stream.width, self.stream.height = frame.width, frame.height
        self.stream.pix_fmt = "pal8" if self.gif else "yuv420p"
        self.stream.codec_context.time_base = self.base
        if self.gif:
            graph = self.graph = self.av.filter.Graph()
            entry = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=self.base)
            split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
            use, end = graph.add("paletteuse", "new=1:dither=none"), graph.add("buffersink")
            entry.link_to(split)
            split.link_to(use, 0, 0)
            split.link_to(palette, 1, 0)
            palette.link_to(use, 0, 1)
            use.link_to(end)
            graph.configure()

    def _drain(self):
        while True:
            try:
                frame = self.graph.pull()
            except (BlockingIOError, EOFError):
                return
            self.container.mux(self.stream.encode(frame))

    def finish(self):
        if self.graph is not None:
            self.graph.push(None)
            self._drain()
        self.container.mux(self.stream.encode(None))

    def close(self):
        self.container.close()
