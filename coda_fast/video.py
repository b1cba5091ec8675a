"""Explanations of videos and animated GIFs: each frame beside its contribution map, with one colour scale for
all frames.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from coda_fast import plot
from coda_fast._classes import class_name, fits_no_class
from coda_fast._files import atomic_path
from coda_fast._video_frames import SIDE, side_by_side
from coda_fast.data import Preprocessing
from coda_fast.data.errors import ImageError
from coda_fast.dynamic_linear import need_network
from coda_fast.explain import batch_within, check_explainable
from coda_fast.network import Network
from coda_fast.safety import printable
from coda_fast.video_files import VideoError, Writer, count_frames, frame_rate, is_video, read_frames

__all__ = ["PERCENTILE", "SIDE", "ExplainedVideo", "VideoError", "explain_video", "is_video"]

PERCENTILE = 99.75  # of absolute contributions over the video, as published
_BINS, _LOW, _HIGH = 36_000, -12.0, 6.0  # histogram of contributions: range in decades; a bin is 0.1 % wide


@dataclasses.dataclass(frozen=True)
class ExplainedVideo:
    """What ``explain_video`` wrote.

    Attributes:
        frames: their number.
        target: the class.
        scale: the end of the colour scale, in logits.
        completeness_error: the largest, in logits.
        probabilities: the least and the greatest of the class in a frame.
        fit_none: the number of frames that fit none of the classes.
    """

    frames: int
    target: int
    scale: float
    completeness_error: float
    probabilities: tuple[float, float]
    fit_none: int

    def verdict(self, class_names: Sequence[str] | None = None, network: str | None = None) -> str:
        """The class and its probabilities in words, how many frames fit no class, and the name of the
        network, if it is given.
        """
        name = printable(class_name(None if class_names is None else list(class_names), self.target))
        low, high = map(plot.probability, self.probabilities)
        none = f", {self.fit_none} of them fit none of the classes" if self.fit_none else ""
        by = "" if network is None else f", explained by {printable(network)}"
        return f"{name} ({low}{'' if low == high else ' to ' + high.removeprefix('p = ')}){none}{by}"


def explain_video(
    model: Network,
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

    The file is decoded once to find the class and once to find the scale, unless they are given, and once to
    write, so that memory does not grow with its length. Frames are turned upright by their rotation metadata;
    pixels that are not square are used as stored. Frames go through ``model.transform`` like pictures. If it
    crops them, the result shows whole frames, faded outside the crop, and the map over the crop.

    If the end of the file is damaged, a warning is issued and the frames before it are explained.

    Args:
        model: a CoDANet, or a wrapper of one.
        source: a file that PyAV can read.
        target_path: its ending determines the format (.mp4, .gif ...); the file appears when it is complete.
        target: the class to explain; None: the one predicted for most frames.
        start: seconds after the first frame.
        end: seconds after the first frame, exclusive; None: the end of the video.
        crop: x, y, width, height in pixels of the upright source.
        size: use whole frames, resized so that the shorter side has this many pixels (0: not resized); None:
            resize and crop them as ``model.transform`` does.
        scale: the end of the colour scale in logits; None: the ``PERCENTILE`` of absolute contributions over
            the video.
        batch: the number of frames explained at once; fewer if they would take more memory than
            ``MEMORY_BUDGET`` of ``coda_fast.explain``.
        progress: called after each batch of each pass with its number of frames and the number of frames of
            all passes together, computed from the container's header (None if that gives no length).

    Raises:
        VideoError: the file is not a video, has no frame in the range or frames of several sizes; the crop is
            outside the frame; the class does not exist; a scale or time is not a positive number; logits are
            not finite; frames do not fit in memory; or the result cannot be written (disk full ...).
        ImportError: PyAV or matplotlib is missing.
    """
    model = need_network(model)
    if target is not None and not 0 <= target < model.num_classes:
        raise VideoError(f"target: expected a class from 0 to {model.num_classes - 1}, got {target}")
    if scale is not None and not 0 < scale < float("inf"):
        raise VideoError(f"scale: expected a positive number, got {scale}")
    if not 0 <= start < float("inf") or (end is not None and not start < end < float("inf")):
        raise VideoError(f"start, end: expected seconds with 0 <= start < end, got {start} and {end}")
    preprocessing = model.transform.at(size, crop=False)
    # 0.2 s is meant as 1/5, not as the floating-point number above it
    first = Fraction(start).limit_denominator(10**6)
    last = None if end is None else Fraction(end).limit_denominator(10**6)
    passes = 1 + (target is None) + (scale is None)
    total = count_frames(source, first, last)
    report = (lambda frames: progress(frames, total and total * passes)) if progress else lambda frames: None
    clip = _Clip(model, source, first, last, crop, preprocessing, batch, report)
    target = _predicted(clip) if target is None else target
    scale = _scale(clip, target) if scale is None else scale
    with atomic_path(target_path) as temporary:
        writer = Writer(temporary, frame_rate(source), target_path)
        try:
            found = _write(clip, writer, target, scale)
            writer.finish()
        finally:
            writer.close()
    return found


@dataclasses.dataclass(frozen=True)
class _Clip:
    """A part of a video, whose frames can be read several times."""

    model: Network
    source: str | os.PathLike
    start: Fraction
    end: Fraction | None
    crop: tuple[int, int, int, int] | None
    preprocessing: Preprocessing
    batch: int
    report: Callable[[int], None]  # called after each batch with its number of frames

    def batches(self):
        """Lists of (image [C, H, W], time, frame [H, W, 3]); the frame is None unless the image is a crop of
        it.
        """
        frames, together = [], None
        for pixels, time in read_frames(self.source, self.start, self.end, self.crop):
            try:
                image = self.preprocessing(pixels)
            except ImageError as error:  # the resized frame would be too large
                raise VideoError(f"{self.source}: {error}") from None
            if together is None:  # the first frame; all have the same size
                check_explainable(self.model, *image.shape[1:], str(self.source))
                together = batch_within(self.model, *image.shape[1:], self.batch)
            frames.append((image, time, pixels if self.preprocessing.crop is not None else None))
            if len(frames) == together:
                yield frames
                self.report(len(frames))
                frames = []
        if frames:
            yield frames
            self.report(len(frames))

    def tensor(self, frames):
        return torch.stack([image for image, *_ in frames]).to(next(self.model.parameters()))

    def explained(self, frames, target):
        try:
            return self.model.explain(self.tensor(frames), target)
        except ValueError as error:  # logits that are not finite
            raise VideoError(f"{self.source}: {error}") from None

    def empty(self):
        end = "the end" if self.end is None else f"{float(self.end):g} s"
        return VideoError(f"{self.source}: no frame from {float(self.start):g} s to {end}")


def _predicted(clip):
    """The class that is predicted for most frames."""
    votes = torch.zeros(clip.model.num_classes, dtype=torch.long)
    for frames in clip.batches():
        with torch.no_grad():
            logits = clip.model(clip.tensor(frames))
        if not torch.isfinite(logits).all():
            raise VideoError(f"{clip.source}: the network gives logits that are not finite")
        votes += logits.argmax(1).bincount(minlength=len(votes)).cpu()
    if not votes.sum():
        raise clip.empty()
    return int(votes.argmax())


def _scale(clip, target):
    """The ``PERCENTILE`` of absolute contributions, from a histogram of their logarithms."""
    histogram = torch.zeros(_BINS, dtype=torch.float64)
    for frames in clip.batches():
        maps = clip.explained(frames, target).pixel_map.abs().double().cpu()
        histogram += torch.histc(maps.clamp(10**_LOW, 10**_HIGH * 0.999).log10(), _BINS, _LOW, _HIGH)
    index = int(torch.searchsorted(histogram.cumsum(0), histogram.sum() * PERCENTILE / 100))
    # If most contributions are zero, the percentile is in the lowest bin; then the maximum replaces it.
    index = index or int(histogram.argwhere().amax() if histogram.any() else 0)
    return 10 ** (_LOW + (min(index, _BINS - 1) + 1) * (_HIGH - _LOW) / _BINS) if index else 1.0


def _write(clip, writer, target, scale):
    """Write every frame beside its map."""
    from PIL import Image

    name, count, worst, fit_none = class_name(clip.model.class_names, target), 0, 0.0, 0
    low, high = 1.0, 0.0
    for frames in clip.batches():
        explanation = clip.explained(frames, target)
        sure = explanation.logits[:, target].sigmoid().tolist()
        worst = max(worst, float(explanation.completeness_error.max()))
        low, high = min(low, *sure), max(high, *sure)
        fit_none += sum(map(fits_no_class, explanation.logits))
        for (image, time, pixels), contribution, p in zip(
            frames, explanation.pixel_map[:, 0].cpu(), sure, strict=True
        ):
            view = None if pixels is None else plot.View.of(Image.fromarray(pixels), clip.preprocessing)
            writer.write(side_by_side(image, contribution, scale, name, plot.probability(p), view), time)
        count += len(frames)
    if not count:
        raise clip.empty()
    return ExplainedVideo(count, target, scale, worst, (low, high), fit_none)
