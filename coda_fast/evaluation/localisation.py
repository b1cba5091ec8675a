"""The grid pointing game: whether the map of a class points to that class (arXiv:2104.00032, section 4.3).

Confident, correctly classified images of distinct classes are laid out in a grid and explained together. The
score of a cell is the share of the positive contributions of its class' map that lie in the cell. A perfect
map scores 1, a uniform map ``1 / cells``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from coda_fast._autocast import wide
from coda_fast._classes import check_range, one_each
from coda_fast.dynamic_linear import network_in
from coda_fast.evaluation import _common as common

if TYPE_CHECKING:
    from coda_fast.evaluation.data import Images


@dataclasses.dataclass(frozen=True)
class Localisation:
    """Scores of G grids with n cells.

    Attributes:
        scores: the share of the positive contributions that lie in the right cell, [G, n], from 0 to 1; 0 if
            a map has no positive contributions.
        images: the images of the grids, as indices of the given ones, [G, n].
        targets: their classes, [G, n].
    """

    scores: torch.Tensor
    images: torch.Tensor
    targets: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Mean, quartiles and standard deviation of all scores, the share of scores above a half, the number
        of grids, and the score of a uniform map.
        """
        values = self.scores.flatten().double()
        low, middle, high = torch.quantile(
            values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        return {
            "mean": float(values.mean()),
            "q25": low,
            "median": middle,
            "q75": high,
            "std": float(values.std(correction=0)),
            "above_half": float((values > 0.5).double().mean()),
            "grids": len(self.scores),
            "chance": 1 / self.scores.shape[1],
        }


def confident_images(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float = 0.5
) -> dict[int, list[int]]:
    """For each class the images that are classified correctly with a probability (sigmoid) above
    ``threshold``, by decreasing probability. Classes without such images are left out.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [5.0, 1.0], [3.0, 4.0], [-1.0, -2.0]])
    >>> confident_images(logits, torch.tensor([0, 0, 0, 0]))
    {0: [1, 0]}
    """
    labels = one_each(labels, len(logits), "labels")
    check_range(labels, logits.shape[1], "labels")
    logits = wide(logits)
    return surest(labels, logits.argmax(1), logits.gather(1, labels[:, None])[:, 0], threshold)


def surest(
    labels: torch.Tensor, predictions: torch.Tensor, own: torch.Tensor, threshold: float = 0.5
) -> dict[int, list[int]]:
    """As ``confident_images``, from the predicted classes and the log-odds of the labels, all [N]."""
    sure = (predictions == labels) & (own.sigmoid() > threshold)
    found: dict[int, list[int]] = {}
    for index in torch.argsort(own, descending=True, stable=True).tolist():
        if sure[index]:
            found.setdefault(int(labels[index]), []).append(index)
    return dict(sorted(found.items()))


def draw_grids(
    confident: dict[int, list[int]], cells: int, grids: int, seed: int = 42, protocol: str = "plain"
) -> np.ndarray:
    """The images of the grids, [G, cells]; G is ``grids``, or less if there are too few confident images.

    "plain": every grid draws its classes among those that have unused images, and takes the most confident
    unused image of each. "published" is how the published results were made: a list of images is drawn in the
    same way, with NumPy's legacy generator, while more classes than cells have unused images. Grid i begins
    at entry ``i (cells + 1)`` of the list and takes the next images of different classes, so that one image
    is skipped between grids.

    Raises:
        ValueError: fewer classes have confident images than a grid needs.
    """
    common.check_choice("protocol", protocol, common.PROTOCOLS)
    least = cells + (protocol == "published")
    if len(confident) < least:
        raise ValueError(
            f"images: a grid needs confident, correctly classified images of at least {least} classes, got "
            f"{len(confident)}"
            f"{' (classes ' + ', '.join(map(str, confident)) + ')' if confident else ''}"
        )
    return (
        _published(confident, cells, grids, seed)
        if protocol == "published"
        else _plain(confident, cells, grids, seed)
    )


def _plain(confident, cells, grids, seed):
    generator, left, found = (
        np.random.default_rng(seed),
        {c: list(images) for c, images in confident.items()},
        [],
    )
    while len(found) < grids and len(classes := [c for c in left if left[c]]) >= cells:
        found.append([left[int(c)].pop(0) for c in generator.choice(classes, cells, replace=False)])
    return np.array(found)


def _published(confident, cells, grids, seed):
    generator, left, flat = (
        np.random.RandomState(seed),
        {c: list(images) for c, images in confident.items()},
        [],
    )
    while len(classes := [c for c in left if left[c]]) > cells:
        flat += [(int(c), left[int(c)].pop(0)) for c in generator.choice(classes, cells, replace=False)]
    found = []
    for start in range(0, len(flat), cells + 1):
        chosen = {}
        for label, image in flat[start:]:
            if len(chosen) < cells:
                chosen.setdefault(label, image)
        if len(found) == grids or len(chosen) < cells:
            break
        found.append(list(chosen.values()))
    return np.array(found)


def canvases(images: torch.Tensor, side: int, protocol: str = "plain") -> torch.Tensor:
    """Images [G, side^2, C, H, W] laid out in grids [G, C, side H, side W]: row by row ("plain") or column by
    column ("published").
    """
    grid = images.unflatten(1, (side, side))
    if protocol == "published":
        grid = grid.transpose(1, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def cell_shares(maps: torch.Tensor, side: int, protocol: str = "plain") -> torch.Tensor:
    """The share of the positive contributions of map j that lie in cell j: [G, side^2, side H, side W] ->
    [G, side^2]. ValueError: the maps do not have the shape of such grids.
    """
    height, width = maps.shape[2:]
    if height % side or width % side or maps.shape[1] != side**2:
        raise ValueError(f"maps: expected [G, {side**2}, multiples of {side}], got {list(maps.shape)}")
    # [G, maps, rows, columns]
    cells = maps.double().clamp(min=0).unflatten(3, (side, -1)).unflatten(2, (side, -1)).sum((3, 5))
    if protocol == "published":
        cells = cells.transpose(2, 3)
    mass = cells.flatten(2)
    total = mass.sum(2)
    return torch.where(
        total > 0, mass.diagonal(dim1=1, dim2=2) / total.clamp_min(torch.finfo(torch.float64).tiny), 0
    )


def localisation(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    attribution: common.Attribution | common.AttributionMethod | None = None,
    *,
    side: int = 3,
    grids: int = 500,
    protocol: str = "plain",
    seed: int = 42,
    threshold: float = 0.5,
    logits: torch.Tensor | None = None,
    batch_size: int = 16,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Localisation:
    """The grid pointing game with ``side x side`` cells; all classes of a batch of grids are explained at
    once.

    Args:
        model: a classifier of images of any size; its logits decide which images are used. A CoDA-Net in a
            wrapper (torch.compile, DataParallel and others) is unwrapped: see ``coda_fast.unwrap``.
        images: [N, C, H, W].
        labels: their classes, [N] or [N, 1], of any integer dtype.
        attribution: ``(grids [B, C, side H, side W], classes [B, side^2]) -> maps [B, side^2, side H, side
            W]``, or an object with such a method ``attribute`` (``coda_fast.baselines.create``); None: the
            model's own contribution maps.
        side: the number of rows and columns of a grid.
        grids: the most grids; the published evaluation has 500 of 3 x 3.
        protocol: "plain", or "published", which is exactly how the published numbers were made (see
            ``draw_grids``), with grids filled column by column.
        seed: of the generator that draws the grids.
        threshold: the probability above which an image is confident.
        logits: the log-odds of the classes, [N, classes], if they are known (for a softmax classifier these
            are not its logits); None: computed here.
        batch_size: the number of grids explained at once.
        progress: a wrapper like tqdm, ``progress(iterable, label)``.

    Raises:
        ValueError, TypeError: shapes or options do not fit, or fewer classes have confident images than a
            grid needs.
    """
    labels, model = common.labelled(images, labels), network_in(model)
    common.check_positive(side=side, grids=grids, batch_size=batch_size)
    attribute = common.attribution_of(model, attribution)
    logits = common.logits_of(model, images, 64) if logits is None else logits
    if logits.shape[0] != len(images) or logits.dim() != 2:
        raise ValueError(f"logits: expected [{len(images)}, classes], got {list(logits.shape)}")
    chosen = torch.from_numpy(
        draw_grids(confident_images(logits, labels, threshold), side**2, grids, seed, protocol)
    )
    batches = chosen.split(batch_size)
    with common.evaluated(model):
        bar = progress(batches, "localisation") if progress else batches
        scores = [score_grids(images, labels, batch, attribute, protocol) for batch in bar]
    return Localisation(torch.cat(scores), chosen, labels.cpu()[chosen])


def score_grids(
    images: torch.Tensor | Images,
    labels: torch.Tensor,
    chosen: torch.Tensor,
    attribute: common.Attribution,
    protocol: str = "plain",
) -> torch.Tensor:
    """The scores [G, n] of the grids that are made of the images ``chosen`` [G, n], in one call of
    ``attribute``.
    """
    side, chosen = math.isqrt(chosen.shape[1]), chosen.to(labels.device)
    grid = canvases(images[chosen], side, protocol)
    return cell_shares(common.maps_of(attribute, grid, labels[chosen]), side, protocol).cpu()
