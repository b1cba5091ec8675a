"""Explanations of files: a figure for each picture (in a folder, all its pictures), a video for each video.

These are the steps of ``coda-fast explain``: ``plan`` decides what is read and what is written, ``readable``
reads every picture before anything is written, and ``explain_picture`` draws one, as
``coda_fast.video.explain_video`` does for a video.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from coda_fast import plot
from coda_fast._files import atomic_path
from coda_fast.data import Preprocessing, decode, listing
from coda_fast.explain import check_explainable
from coda_fast.explanation import Explanation
from coda_fast.network import Network
from coda_fast.video import is_video


@dataclasses.dataclass(frozen=True)
class Job:
    """A file to explain, and the file that will show its explanation.

    Attributes:
        source: the file to explain.
        result: the file to write.
        named: whether the user named the file itself, not the folder that it is in.
        video: whether it is a video.
    """

    source: Path
    result: Path
    named: bool
    video: bool


def plan(images: Iterable[Path], output: Path, ending: str | None = None) -> list[Job]:
    """A job for each picture or video in ``images``, which are files or folders of pictures.

    Results lie below the folder ``output``: NAME_explained.png, or a video with ``ending`` (None: "gif" for a
    GIF, else "mp4"). The pictures of a folder keep their subfolders, and names that would differ in nothing
    else keep their endings.

    Raises:
        ValueError: a folder has no pictures, or several files would be written to one.
    """
    jobs, found = [], []  # found: path, and where its result goes below the output folder
    for path in images:
        if not path.is_dir():
            if path.is_file() and is_video(path):
                suffix = ending or ("gif" if path.suffix.lower() == ".gif" else "mp4")
                jobs.append(Job(path, output / f"{path.stem}_explained.{suffix}", True, True))
            else:
                found.append((path, Path(), True))
        elif pictures := listing.pictures(path):
            found += [(picture, picture.relative_to(path).parent, False) for picture in pictures]
        else:
            raise ValueError(f"IMAGES: expected pictures in {path}, found none")
    alike = collections.Counter((place, path.stem) for path, place, _ in found)
    for path, place, named in found:
        name = path.name if alike[place, path.stem] > 1 and not named else path.stem
        jobs.append(Job(path, output / place / f"{name}_explained.png", named, False))
    results = collections.Counter(job.result for job in jobs)
    if twice := sorted(path for path, count in results.items() if count > 1):
        raise ValueError(
            f"several images would be written to {', '.join(map(str, twice[:5]))}; explain them one by one"
        )
    return jobs


def as_network_sees(
    model: Network, path: Path, preprocessing: Preprocessing, classes: int = 1
) -> torch.Tensor:
    """A picture after ``preprocessing``, [C, H, W].

    Raises:
        ValueError: the picture cannot be read, or this machine has too little memory for its explanation
            with this number of classes.
    """
    tensor = preprocessing(path)
    height, width = tensor.shape[1:]
    check_explainable(model, height, width, str(path), classes)
    return tensor


@dataclasses.dataclass(frozen=True)
class Means:
    """What explains a picture: a network, the preprocessing of the picture, the classes to explain (empty:
    the two most likely), and the network's name, if figures are to show it.
    """

    model: Network
    preprocessing: Preprocessing
    classes: Sequence[int] = ()
    name: str | None = None

    @property
    def count(self) -> int:
        """The number of classes that are explained."""
        return len(self.classes) or min(2, self.model.num_classes)

    def read(self, path: Path) -> torch.Tensor:
        """A picture as the network sees it; raises what ``as_network_sees`` does."""
        return as_network_sees(self.model, path, self.preprocessing, self.count)


def readable(
    means: Callable[[Path], Means],
    jobs: Sequence[Job],
    skip: Callable[[ValueError], None] = lambda error: None,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> list[Job]:
    """The jobs whose pictures can be explained. Each picture is read once for this and not kept, so the
    pictures need not fit in memory together.

    Args:
        means: what explains a picture.
        skip: called with the error if a picture of a folder cannot be explained, which is then left out.
        progress: as in ``coda_fast.demo.run``.

    Raises:
        ValueError: a picture that the user named cannot be explained, or none can.
    """
    found = []
    for job in progress(jobs, "reading") if progress and len(jobs) > 1 else jobs:
        try:
            means(job.source).read(job.source)
        except ValueError as error:
            if job.named:
                raise
            skip(error)
        else:
            found.append(job)
    if jobs and not found:
        raise ValueError(f"IMAGES: expected at least one image that can be read, got {len(jobs)} files")
    return found


def explain_picture(means: Means, source: Path, target_path: Path) -> Explanation:
    """Write the figure of one picture as PNG, whole or not at all. It shows the original picture with the
    crop that the network sees, and the maps in the place of that crop. Missing folders are made.

    Raises:
        ValueError: the picture cannot be read or explained, or the network's logits are not finite.
    """
    model, image = means.model, means.read(source)
    batch = image[None].to(next(model.parameters()))
    with torch.no_grad():
        logits = model(batch)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{source}: the network gives logits that are not finite: {logits.flatten().tolist()[:4]}"
        )
    chosen = torch.tensor([list(means.classes)]) if means.classes else logits.topk(means.count).indices
    explanation = model.explain(batch, chosen)
    views = [plot.View.of(decode(source), means.preprocessing)]
    drawn = plot.render(
        plot.explanation_figure(
            batch, explanation, model.logit_bias, model.class_names, views=views, networks=[means.name]
        )
    )
    target_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target_path) as temporary:
        temporary.write_bytes(drawn)
    return explanation
