"""Video files and animated GIFs: recognising them, reading their frames with times, and writing them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from coda_fast.safety import MOST_PIXELS, NotAFile, open_file

_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")


class VideoError(ValueError):
    """A file or an option is unsuitable for explaining a video; the message names the file, what was expected
    and what was found.
    """


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is an animated GIF for Pillow or, if Pillow cannot read it, a video for PyAV."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            # The frames are not counted, because there may be millions.
            return image.format == "GIF" and image.is_animated
    except UnidentifiedImageError:
        pass
    except Exception:  # a damaged picture: reading it will report the error
        return False
    try:
        with _open(path) as container:
            return bool(container.streams.video)
    except ImportError:
        if Path(path).suffix.lower() in _ENDINGS:
            raise
        return False
    except Exception:  # a damaged video: reading it will report the error
        return Path(path).suffix.lower() in _ENDINGS


def _av():
    try:
        import av
    except ImportError:
        raise ImportError("videos need PyAV: pip install 'coda-fast[video]'") from None
    return av


# The ffmpeg formats that are a single file of pictures. No others are read: playlists and scripts make ffmpeg
# open the files and addresses that they name, and ffmpeg takes any text file for a terminal recording.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,flv,mpeg,mpegts,mpegvideo,m4v,ogg,asf,"
    "h264,hevc,vvc,h263,h261,av1,obu,ivf,nut,rm,mxf,"
    "dv,yuv4mpegpipe,mjpeg,wtv,swf"
)


def _open(source):
    """A PyAV container; FFmpegError if it is not a video, or its format is not one of ``_FORMATS``."""
    with open_file(source):
        pass  # raises for a pipe, which would block, and for a device
    return _av().open(os.fspath(source), options={"format_whitelist": _FORMATS})


def frame_rate(source: str | os.PathLike) -> Fraction:
    """Frames per second; 25 if the file does not say."""
    with _open(source) as container:
        return container.streams.video[0].average_rate or Fraction(25)


def count_frames(source: str | os.PathLike, start: Fraction, end: Fraction | None) -> int | None:
    """The number of frames in the range, by the container's header; None if that does not give a length."""
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
        return None  # read_frames reports the error


def _upright(frame):
    """The pixels of a frame, turned upright, [H, W, 3] uint8."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _complete_gif(path):
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().rstrip(b"\0").endswith(b";")


def read_frames(
    source: str | os.PathLike, start: Fraction, end: Fraction | None, crop: tuple[int, int, int, int] | None
) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Frames [H, W, 3] in the range, each with its time after the first of them."""
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
            else:  # ffmpeg reports no error at the end of a file that was cut off
                if number < stream.frames or (container.format.name == "gif" and not _complete_gif(source)):
                    warnings.warn(
                        f"{source}: cut off after frame {number}; the readable part is explained",
                        stacklevel=2,
                    )
    except av.FFmpegError as error:
        if not number:
            raise VideoError(f"{source}: not a video that can be read: {error.strerror}") from None
        warnings.warn(f"{source}: damaged after frame {number}; the readable part is explained", stacklevel=2)


class Writer:
    """Writes frames with their times into a video file. Each frame of a GIF gets a palette of its own, so
    that it can be written before later frames are known.
    """

    def __init__(self, path: Path, rate: Fraction, name: str | os.PathLike):
        self.av, self.rate, self.last = _av(), rate, -1
        self.stream: Any = None
        self.graph: Any = None
        self.name = name  # the final name of the temporary file, for messages
        self.gif = path.suffix.lower() == ".gif"
        self.base = Fraction(1, 100) if self.gif else Fraction(1, 90_000)
        try:
            self.container = self.av.open(os.fspath(path), "w")
        except (self.av.FFmpegError, ValueError):
            raise VideoError(
                f"{path.suffix}: expected the ending of a video format, such as .mp4 or .gif"
            ) from None

    def write(self, pixels: np.ndarray, time: Fraction) -> None:
        """Write one frame, [H, W, 3] uint8, shown from ``time`` in seconds."""
        with self._errors_in_words():
            self._write(pixels, time)

    def _write(self, pixels, time):
        frame = self.av.VideoFrame.from_ndarray(pixels, format="rgb24")
        # Times must increase, but those of fast videos may not when rounded to the 1/100 s of a GIF.
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

    def finish(self) -> None:
        """Flush the encoder and the container, and end the file."""
        with self._errors_in_words():
            if self.graph is not None:
                self.graph.push(None)
                self._drain()
            self.container.mux(self.stream.encode(None))
            self.container.close()

    def close(self) -> None:
        """Close the file. Errors are ignored, so that they do not hide the one that made the caller stop."""
        with contextlib.suppress(self.av.FFmpegError, OSError):
            self.container.close()

    @contextlib.contextmanager
    def _errors_in_words(self):
        try:
            yield
        # a full disk, or frames larger than the format allows
        except (self.av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.name}: cannot be written: {error.strerror or error}") from None
