"""The grid pointing game: does a class' map find the class among others? (arXiv:2104.00032, section 4.3)

Confident, correctly classified images of distinct classes are laid out in a grid and explained together; the
score of a cell is the share of the positive mass of its class' map that lies in it. 1 is perfect, ``1 /
cells`` what a uniform map scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from coda_fast._autocast import wide
from coda_fast._classes import check_range, one_each
from coda_fast.dynamic_linear import network_in
from coda_fast.evaluation import _common as common


@dataclasses.dataclass(frozen=True)
class Localisation:
    """Scores of G grids with n cells.

    Attributes:
        scores: share of the positive mass in the own cell, [G, n], from 0 to 1; 0 where a map has no positive
            mass.
        images: which images the grids are made of, indices into the given ones, [G, n].
        targets: their classes, [G, n].
    """

    scores: torch.Tensor
    images: torch.Tensor
    targets: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Mean, quartiles and standard deviation of all scores, share above a half, number of grids, what
        chance scores.
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
    """For each class with any: images that are classified correctly with a probability (sigmoid) above
    ``threshold``, surest first.

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
    """The same, of predicted classes and the log-odds of the labels, all [N]."""
    sure = (predictions == labels) & (own.sigmoid() > threshold)
    found = {}
    for index in torch.argsort(own, descending=True, stable=True).tolist():
        if sure[index]:
            found.setdefault(int(labels[index]), []).append(index)
    return dict(sorted(found.items()))


def draw_grids(
    confident: dict[int, list[int]], cells: int, grids: int, seed: int = 42, protocol: str = "plain"
) -> np.ndarray:
    """Images of the grids, [G, cells], G at most ``grids``: fewer where the confident images do not suffice.

    "plain": every grid draws its classes among those that have images left, and takes the surest of each that
    was not used yet. "published": the list of images is drawn likewise, as long as more classes than cells
    have images left, with NumPy's legacy generator; grid i then starts at entry ``i (cells + 1)`` of the
    list, one image beyond the end of the last grid, and takes the next images whose classes it does not have
    yet. So the published results were made: one image in each ``cells + 1`` is skipped.

    Raises:
        ValueError: fewer classes with confident images than a grid has cells.
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
    """[G, side^2, C, H, W] as grids [G, C, side H, side W]; cell j row by row ("plain") or column by
    column ("published").
    """
    grid = images.unflatten(1, (side, side))
    if protocol == "published":
        grid = grid.transpose(1, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def cell_shares(maps: torch.Tensor, side: int, protocol: str = "plain") -> torch.Tensor:
    """Share of the positive mass of map j that lies in cell j: [G, side^2, side H, side W] -> [G, side^2].
    ValueError: no such grid.
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
    model,
    images: torch.Tensor,
    labels: torch.Tensor,
    attribution: common.Attribution | None = None,
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
        model: a classifier of images of any size; its logits decide which images are used. Of a wrapped
            CoDA-Net (torch.compile, DataParallel and others: ``coda_fast.unwrap``), the network inside.
        images, labels: [N, C, H, W] and their classes [N] or [N, 1], of any integer dtype.
        attribution: ``(grids [B, C, side H, side W], classes [B, side^2]) -> maps [B, side^2, side H, side
            W]``, or an object with such a method ``attribute`` (``coda_fast.baselines.create``); None: the
            model's own contribution maps.
        grids: how many at most; the published evaluation has 500 of 3 x 3.
        protocol: "plain", or "published": to the letter what the published numbers were made with (see
            ``draw_grids``), columns first.
        logits: [N, classes], if they are known, log-odds of classes (of a softmax classifier they are
            computed from its logits).
        batch_size: grids explained at once.
        progress: a wrapper like tqdm, ``progress(iterable, label)``.

    Raises:
        ValueError, TypeError: shapes or options that do not fit; fewer classes with confident images than a
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
    images, labels, chosen: torch.Tensor, attribute: common.Attribution, protocol: str = "plain"
) -> torch.Tensor:
    """Scores of the grids of these images, [G, n] -> [G, n], in one call of ``attribute``."""
    side, chosen = math.isqrt(chosen.shape[1]), chosen.to(labels.device)
    grid = canvases(images[chosen], side, protocol)
    return cell_shares(common.maps_of(attribute, grid, labels[chosen]), side, protocol).cpu()
