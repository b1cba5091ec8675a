"""Explanations of videos and animated GIFs: each frame beside its contribution map, one colour scale for
all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from coda_fast import plot
from coda_fast._classes import class_name
from coda_fast._files import atomic_path
from coda_fast.data.errors import ImageError
from coda_fast.dynamic_linear import need_network
from coda_fast.safety import MOST_PIXELS, NotAFile, batch_within, check_explainable, open_file

PERCENTILE = 99.75  # of absolute contributions over the video, as published
SIDE = 256  # pixels of a panel's shorter side, at least
_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
_BINS, _LOW, _HIGH = 36_000, -12.0, 6.0  # decades; a bin is 0.1 % wide


class VideoError(ValueError):
    """A file or an option that no video can be explained with; the message names the file, what was
    expected and what was found.
    """


@dataclasses.dataclass(frozen=True)
class ExplainedVideo:
    """What ``explain_video`` wrote: number of frames, class, end of the colour scale and largest
    completeness error (both in logits).
    """

    frames: int
    target: int
    scale: float
    completeness_error: float


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is an animation for Pillow or, where Pillow cannot read it, a video for PyAV."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            # without counting the frames, of which there may be millions
            return image.format == "GIF" and image.is_animated
    except UnidentifiedImageError:
        pass
    except Exception:  # a damaged picture: whoever reads it says what is wrong
        return False
    try:
        with _open(path) as container:
            return bool(container.streams.video)
    except ImportError:
        if Path(path).suffix.lower() in _ENDINGS:
            raise
        return False
    except Exception:  # who reads it says what is wrong
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
    progress: Callable[[int, int | None], None] | None = None,
) -> ExplainedVideo:
    """Write the frames of ``source`` as the network sees them (left) beside their contribution maps (right),
    without sound.

    The file is decoded once for each thing to find (class, scale) and once to write, so memory does not grow
    with its length. Frames are turned upright (rotation metadata); pixels that are not square are taken as
    stored. They go through ``model.transform`` like pictures: where it crops, the clip shows whole frames,
    faded but for what the network sees, and the maps where they belong.

    Args:
        target_path: its ending gives the format (.mp4, .gif ...); appears only when complete.
        target: class; None: the one predicted for most frames.
        start, end: seconds from the first frame; ``end`` is excluded.
        crop: x, y, width, height in pixels of the upright source.
        size: whole frames, of so many pixels of the shorter side; 0: as they are; None: resized and cropped
            as the model says.
        scale: end of the colour scale in logits; None: the ``PERCENTILE`` of absolute contributions over the
            video.
        batch: frames explained at once, fewer where they are so large that the network would take more than a
            GiB for them.
        progress: called after each batch of each pass with its number of frames and the number of all passes
            together (by what the container says of its length; None if it says nothing).

    Raises:
        VideoError: not a video, no frame in the range, a crop outside the frame, frames of several sizes, a
            class that does not exist, a scale or a time that is not a positive number, logits that are not
            finite, frames that this machine cannot hold, a file that cannot be written (disk full ...).
        ImportError: PyAV or matplotlib is missing. A damaged end is a warning: what could be decoded is
            explained.
    """
    from PIL import Image

    model = need_network(model)
    if target is not None and not 0 <= target < model.num_classes:
        raise VideoError(f"target: expected a class from 0 to {model.num_classes - 1}, got {target}")
    if scale is not None and not 0 < scale < float("inf"):
        raise VideoError(f"scale: expected a positive number, got {scale}")
    if not 0 <= start < float("inf") or (end is not None and not start < end < float("inf")):
        raise VideoError(f"start, end: expected seconds with 0 <= start < end, got {start} and {end}")
    preprocessing = model.transform.at(size, crop=False)
    # 0.2 s is 1/5, not the binary fraction above it
    start = Fraction(start).limit_denominator(10**6)
    end = None if end is None else Fraction(end).limit_denominator(10**6)
    parameter = next(model.parameters())
    total = _count(source, start, end)
    total = total and total * (1 + (target is None) + (scale is None))

    def batches():
        frames, together = [], None
        for pixels, time in _frames(source, start, end, crop):
            try:
                image = preprocessing(pixels)
            except ImageError as error:  # scaled, it would be too large
                raise VideoError(f"{source}: {error}") from None
            if together is None:  # frames are of one size
                check_explainable(model, *image.shape[1:], str(source))
                together = batch_within(model, *image.shape[1:], batch)
            frames.append((image, time, pixels if preprocessing.crop is not None else None))
            if len(frames) == together:
                yield frames
                report(frames)
                frames = []
        if frames:
            yield frames
            report(frames)

    def report(frames):
        if progress:
            progress(len(frames), total)

    def tensor(frames):
        return torch.stack([image for image, *_ in frames]).to(parameter)

    votes = torch.zeros(model.num_classes, dtype=torch.long)
    for frames in batches() if target is None else ():
        with torch.no_grad():
            votes += (
                _finite(model(tensor(frames)), source).argmax(1).bincount(minlength=model.num_classes).cpu()
            )
    if target is None:
        if not votes.sum():
            raise VideoError(
                f"{source}: no frame from {float(start):g} s to "
                f"{'the end' if end is None else f'{float(end):g} s'}"
            )
        target = int(votes.argmax())
    if scale is None:
        histogram = torch.zeros(_BINS, dtype=torch.float64)
        for frames in batches():
            explanation = _explained(model, tensor(frames), target, source)
            maps = explanation.contribution_map.abs().double().cpu()
            histogram += torch.histc(maps.clamp(10**_LOW, 10**_HIGH * 0.999).log10(), _BINS, _LOW, _HIGH)
        index = int(torch.searchsorted(histogram.cumsum(0), histogram.sum() * PERCENTILE / 100))
        # mostly nothing: the largest
        index = index or int(histogram.argwhere().amax() if histogram.any() else 0)
        scale = 10 ** (_LOW + (min(index, _BINS - 1) + 1) * (_HIGH - _LOW) / _BINS) if index else 1.0

    name = class_name(model.class_names, target)
    count, worst = 0, 0.0
    with atomic_path(target_path) as temporary:
        writer = _Writer(temporary, _rate(source), target_path)
        try:
            for frames in batches():
                explanation = _explained(model, tensor(frames), target, source)
                sure = explanation.logits[:, target].sigmoid().tolist()
                worst = max(worst, float(explanation.completeness_error.max()))
                for (image, time, pixels), contribution, p in zip(
                    frames, explanation.contribution_map[:, 0].cpu(), sure, strict=True
                ):
                    view = None if pixels is None else plot.View.of(Image.fromarray(pixels), preprocessing)
                    writer.write(_picture(image, contribution, scale, name, plot.probability(p), view), time)
                count += len(frames)
            if not count:
                raise VideoError(
                    f"{source}: no frame from {float(start):g} s to "
                    f"{'the end' if end is None else f'{float(end):g} s'}"
                )
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


def _explained(model, frames, target, source):
    try:
        return model.explain(frames, target)
    except ValueError as error:  # logits that are not finite
        raise VideoError(f"{source}: {error}") from None


def _finite(logits, source):
    if not torch.isfinite(logits).all():
        raise VideoError(f"{source}: the network gives logits that are not finite")
    return logits


# Of ffmpeg's formats those that are one file of pictures: playlists and scripts would have it open what else
# they name, and any text is a terminal to it
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,flv,mpeg,mpegts,mpegvideo,m4v,ogg,asf,"
    "h264,hevc,vvc,h263,h261,av1,obu,ivf,nut,rm,mxf,"
    "dv,yuv4mpegpipe,mjpeg,wtv,swf"
)


def _open(source):
    """A container of PyAV. FFmpegError: not a video, or of a format that is not one file."""
    with open_file(source):
        pass  # no pipe, which would block, and no device
    return _av().open(os.fspath(source), options={"format_whitelist": _FORMATS})


def _rate(source):
    with _open(source) as container:
        return container.streams.video[0].average_rate or Fraction(25)


def _count(source, start, end):
    """Frames in the range, by what the container says of its length; None if it says nothing."""
    av = _av()
    try:
        with open_file(source):
            pass
    except FileNotFoundError:
        raise VideoError(f"{source}: no such file") from None
    except (NotAFile, OSError) as error:
        raise VideoError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        with _open(source) as container:
            stream = container.streams.video[0]
            if start == 0 and end is None and stream.frames:
                return stream.frames
            length = (
                stream.duration * stream.time_base
                if stream.duration
                else Fraction(container.duration or 0, av.time_base)
            )
            length = (length if end is None else min(length, end)) - start
            return round(length * stream.average_rate) if length > 0 and stream.average_rate else None
    except (av.FFmpegError, IndexError):
        return None  # _frames says what is wrong


def _upright(frame):
    """[H, W, 3] uint8."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _complete_gif(path):
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().rstrip(b"\0").endswith(b";")


def _frames(source, start, end, crop) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Frames [H, W, 3] in the range with their times from the first frame written."""
    av = _av()
    number, zero, first, sides = 0, None, None, None
    try:
        with _open(source) as container:
            if not container.streams.video:
                raise VideoError(f"{source}: expected a video, got a file without pictures")
            stream = container.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            if stream.codec_context is None:
                raise VideoError(f"{source}: not a video that can be read: its codec is not known")
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            for frame in container.decode(stream):
                time = frame.pts * frame.time_base if frame.pts is not None else number / rate
                zero = time if zero is None else zero
                number += 1
                time -= zero
                if time < start:
                    continue
                if end is not None and time >= end:
                    break
                pixels = _upright(frame)
                height, width = pixels.shape[:2]
                sides = sides or (width, height)
                if (width, height) != sides:
                    raise VideoError(
                        f"{source}: expected frames of one size, got {sides[0]} x {sides[1]} and, at frame "
                        f"{number}, {width} x {height}"
                    )
                if crop is not None:
                    x, y, w, h = crop
                    if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
                        raise VideoError(
                            f"{source}: crop: expected a box inside {width} x {height} pixels, got {x} {y} "
                            f"{w} {h}"
                        )
                    pixels = pixels[y : y + h, x : x + w]
                first = time if first is None else first
                yield np.ascontiguousarray(pixels), time - first
            else:  # ffmpeg ends a file that was cut off without an error
                if number < stream.frames or (container.format.name == "gif" and not _complete_gif(source)):
                    warnings.warn(
                        f"{source}: cut off after frame {number}; the readable part is explained",
                        stacklevel=2,
                    )
    except av.FFmpegError as error:
        if not number:
            raise VideoError(f"{source}: not a video that can be read: {error.strerror}") from None
        warnings.warn(f"{source}: damaged after frame {number}; the readable part is explained", stacklevel=2)


@functools.lru_cache
def _font(size, file=None):
    """That of figures, which has most alphabets, or another one."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        file or os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _picture(image, contribution, scale, name, sure, view=None):
    """[H, W, 3] uint8, even sides: frame and map; below them the class with its probability and the colour
    scale.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    colours = colormaps[plot.COLOURS]
    left = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    right = colours((contribution.float().numpy() / scale).clip(-1, 1) / 2 + 0.5, bytes=True)[..., :3]
    if view is not None:
        left, right = view.with_crop(left, SIDE), view.with_map(right, SIDE)
    factor = max(1, -(-SIDE // min(left.shape[:2]))) if view is None or not view.cropped else 1
    left, right = (panel.repeat(factor, 0).repeat(factor, 1) for panel in (left, right))
    height, width = left.shape[:2]
    unit = max(1, width // SIDE)  # of everything below, so that it is legible beside large panels too
    gap, strip = 8 * unit, 36 * unit
    # 4:2:0 needs even sides
    canvas = Image.new("RGB", (2 * width + gap, height + strip + height % 2), "white")
    start = width + gap  # of the map
    canvas.paste(Image.fromarray(left), (0, 0))
    canvas.paste(Image.fromarray(right), (start, 0))
    draw = ImageDraw.Draw(canvas)
    # the map's edge, which may be white
    draw.line([(start - 1, 0), (start - 1, height), (start + width, height)], "#999999")
    draw.line([(0, height), (width - 1, height)], "#999999")

    def caption(kept):  # in pieces, each with its font: Pillow draws with one at a time
        text = f"{name}: {sure}" if kept == len(name) else f"{name[:kept].rstrip()}\u2026: {sure}"
        return [(piece, _font(14 * unit, file)) for piece, file in plot.pieces(text)]

    kept = len(name)
    while sum(font.getlength(piece) for piece, font in caption(kept)) > width - 8 * unit and kept:
        kept -= 1
    ascent, descent = _font(14 * unit).getmetrics()
    x, baseline = 4 * unit, height + strip // 2 + (ascent - descent) // 2
    for piece, font in caption(kept):
        draw.text((x, baseline), piece, "black", font, anchor="ls")
        x += font.getlength(piece)

    bar = colours(np.linspace(0, 1, width - 2 * gap), bytes=True)[None, :, :3].repeat(8 * unit, 0)
    canvas.paste(Image.fromarray(bar), (start + gap, height + 6 * unit))
    draw.rectangle(
        (start + gap - 1, height + 6 * unit - 1, start + width - gap, height + 14 * unit), outline="#999999"
    )
    font, line = _font(11 * unit), height + 26 * unit
    draw.text((start + gap, line), f"\u2212{scale:.2g}", "black", font, anchor="lm")
    draw.text((start + width // 2, line), "logit per pixel", "black", font, anchor="mm")
    draw.text((start + width - gap, line), f"+{scale:.2g}", "black", font, anchor="rm")
    return np.asarray(canvas)


class _Writer:
    """Frames with their times into a file; GIFs through a palette for each frame, so that no frame has to
    wait for the last.
    """

    def __init__(self, path, rate, name):
        self.av, self.rate, self.stream, self.graph, self.last = _av(), rate, None, None, -1
        self.name = name  # of what the file will be
        self.gif = path.suffix.lower() == ".gif"
        self.base = Fraction(1, 100) if self.gif else Fraction(1, 90_000)
        try:
            self.container = self.av.open(os.fspath(path), "w")
        except (self.av.FFmpegError, ValueError):
            raise VideoError(
                f"{path.suffix}: expected the ending of a video format, such as .mp4 or .gif"
            ) from None

    def write(self, pixels, time):
        with self._said():
            self._write(pixels, time)

    def _write(self, pixels, time):
        frame = self.av.VideoFrame.from_ndarray(pixels, format="rgb24")
        # times must grow, which above 100 Hz a GIF's do not
        self.last = max(round(time / self.base), self.last + 1)
        frame.pts, frame.time_base = self.last, self.base
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
            entry = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=self.base
            )
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
        """What encoder and container still hold, and the end of the file: only then it is whole."""
        with self._said():
            if self.graph is not None:
                self.graph.push(None)
                self._drain()
            self.container.mux(self.stream.encode(None))
            self.container.close()

    def close(self):
        """After an error, which what cannot be written now must not hide."""
        with contextlib.suppress(self.av.FFmpegError, OSError):
            self.container.close()

    @contextlib.contextmanager
    def _said(self):
        try:
            yield
        # a full disk, or pictures that the format has no room for
        except (self.av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.name}: cannot be written: {error.strerror or error}") from None
