"""Pixel removal: a good map gives the lowest ranks to pixels that a prediction does not need
(arXiv:2104.00032, section 4.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from coda_fast._classes import check_range
from coda_fast.dynamic_linear import DynamicLinear, network_in
from coda_fast.evaluation import _common as common
from coda_fast.functional import dau_conv2d
from coda_fast.models import CoDANet
from coda_fast.nn import DAUConv2d

ORDERS = ("least", "most")
# If more than this share of a layer's outputs change from one point of the curve to the next, the layer and
# all layers after it are recomputed as a whole.
WHOLE = 0.6


@dataclasses.dataclass(frozen=True)
class Removal:
    """Curves of N images at P points.

    Attributes:
        fractions: the share of pixels that are removed (or inserted), [P], ascending.
        probabilities: of the target class, [N, P].
    """

    fractions: torch.Tensor
    probabilities: torch.Tensor

    def curve(self) -> torch.Tensor:
        """Mean over the images, [P]."""
        return self.probabilities.mean(0)

    def area(self) -> torch.Tensor:
        """The area under each image's curve by the trapezoidal rule, divided by the range of fractions: the
        mean probability along the curve, [N].
        """
        return torch.trapezoid(self.probabilities, self.fractions, dim=1) / (
            self.fractions[-1] - self.fractions[0]
        )


def pixel_removal(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    attribution: common.Attribution | common.AttributionMethod | None = None,
    *,
    order: str = "least",
    fraction: float = 0.25,
    points: int = 129,
    insert: bool = False,
    batch_size: int = 256,
    attribution_batch: int = 32,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Removal:
    """The probability of the target while pixels are removed, the least (or most) important first. For a
    CoDA-Net it is the sigmoid of the logit, for other classifiers the softmax.

    A removed pixel is zero in all channels of the encoded image (all six of a CoDA-Net, which no real pixel
    is), so that it contributes nothing. For other models, and networks with a stem, the image itself is
    masked. The defaults are the
    published settings: for 32 x 32 images 0 to 256 pixels in steps of 2. The published numbers are for the
    first 1,024 test images and their true classes.

    Args:
        model: a classifier; a CoDA-Net in a wrapper is unwrapped (``coda_fast.unwrap``).
        images: [N, C, H, W].
        targets: the class of each image whose probability is measured, [N] or [N, 1], of any integer dtype.
        attribution: as for ``localisation``: ``(images [B, C, H, W], classes [B, 1]) -> maps [B, 1, H, W]``;
            None: the model's own.
        order: which pixels are removed first: the "least" or the "most" important.
        fraction: the share of pixels that are removed at the end of the curve; "most" up to 1 is known as
            deletion.
        points: the number of points of the curve, both ends included.
        insert: start from an image without pixels and insert them in the same order ("most" is known as
            insertion).
        batch_size: the number of masked images that are classified at once.
        attribution_batch: the number of images that are explained at once.
        progress: a wrapper like tqdm, ``progress(iterable, label)``.

    Raises:
        ValueError, TypeError: shapes or options do not fit.
    """
    targets, model = common.labelled(images, targets, "targets"), network_in(model)
    common.check_choice("order", order, ORDERS)
    common.check_positive(points=points, batch_size=batch_size, attribution_batch=attribution_batch)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and at most 1, got {fraction!r}")
    pixels = images.shape[2] * images.shape[3]
    last = int(fraction * pixels)
    if points < 2 or last < 1:
        raise ValueError(
            f"points, fraction: expected at least two points and one pixel, got {points} and {last} of "
            f"{pixels}"
        )
    attribute = common.attribution_of(model, attribution)
    every = torch.linspace(0, last, points, dtype=torch.float64).round().long().to(images.device)
    counts, point = every.unique(return_inverse=True)  # points of a small image may coincide
    starts, rows = range(0, len(images), attribution_batch), []
    for start in progress(starts, "pixel removal") if progress else starts:
        part, classes = images[start : start + attribution_batch], targets[start : start + attribution_batch]
        with common.evaluated(model):
            maps = common.maps_of(attribute, part, classes[:, None])[:, 0]
            curves = _curves_by_changes if _by_changes(model, images) else _curves
            rows.append(
                curves(model, part, classes, _turns(maps, order), counts, insert, batch_size)[:, point].cpu()
            )
    probabilities = torch.cat(rows) if rows else torch.empty(0, points)
    return Removal(every.cpu().double() / pixels, probabilities.double())


def _turns(maps, order):
    """The position of each pixel in the order of removal, [N, H, W]; equal ones in the order of the image."""
    flat = maps.flatten(1)
    ranking = torch.argsort(flat, dim=1, descending=order == "most", stable=True)
    turns = torch.empty_like(ranking)
    turns.scatter_(1, ranking, torch.arange(flat.shape[1], device=flat.device).expand_as(ranking))
    return turns.view(maps.shape)


def _encodes_pixels(model):
    """Whether the model encodes pixels, so that a pixel can be removed from the encoded image. In a network
    with a stem, as in other models, it is removed from the image.
    """
    return isinstance(model, DynamicLinear) and model.stem_name is None


def _curves(model, images, classes, turns, counts, insert, batch_size):
    """The probabilities [N, P] of the targets at the points ``counts``, computed from whole masked images."""
    with torch.no_grad():
        encoded = model.encoder(images) if _encodes_pixels(model) else images
        found = []
        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(counts))).to(images.device)
        for image, point in (pair.unbind(1) for pair in pairs.split(batch_size)):
            gone = turns[image] < counts[point][:, None, None]
            kept = (gone if insert else ~gone)[:, None]
            logits = common.log_odds(model, _logits(model, encoded[image] * kept))
            check_range(classes, logits.shape[1], "targets")
            found.append(logits.gather(1, classes[image][:, None])[:, 0].sigmoid())
    return torch.cat(found).view(len(images), len(counts))


def _by_changes(model, images):
    """Whether to compute only the outputs that change from point to point. That is faster on a CPU; on a GPU
    many small steps are slower than whole images.
    """

    def plain(layer):
        return type(layer) is DAUConv2d and not layer._forward_hooks and not layer._forward_pre_hooks

    return (
        isinstance(model, CoDANet)
        and _encodes_pixels(model)
        and images.device.type == "cpu"
        and all(map(plain, model.layers))
    )


def _curves_by_changes(model, images, classes, turns, counts, insert, batch_size):
    """As ``_curves``, point after point. The first layers recompute only those outputs that depend on pixels
    removed since the last point. The other layers compute several points in one batch.
    """
    parts = zip(*(t.split(batch_size) for t in (images, classes, turns)), strict=True)
    return torch.cat([_changes(model, *part, counts, insert, batch_size) for part in parts])


def _changes(model, images, classes, turns, counts, insert, batch_size):
    with torch.no_grad():
        encoded, mask = model.encoder(images), lambda count: ((turns < count) == insert)[:, None]
        before = mask(counts[0])
        depth = _worth_updating(model.layers, before != mask(counts[1]))
        activations, waiting, found = [encoded * before], [], []
        for layer in model.layers[:depth]:
            activations.append(layer(activations[-1]))
        for point, count in enumerate(counts):
            if point:
                kept = mask(count)
                changed, before, activations[0] = kept != before, kept, encoded * kept
                for i, layer in enumerate(model.layers[:depth]):
                    changed = _reached(layer, changed)
                    _update(layer, activations[i], activations[i + 1], changed)
            waiting.append(activations[depth].clone())
            if point + 1 == len(counts) or (len(waiting) + 1) * len(images) > batch_size:
                logits = common.log_odds(model, model.head(model.run_layers(torch.cat(waiting), depth)))
                check_range(classes, logits.shape[1], "targets")
                watched = logits.unflatten(0, (len(waiting), -1))[:, torch.arange(len(images)), classes]
                found.append(watched.sigmoid())
                waiting = []
    return torch.cat(found).t()


def _worth_updating(layers, changed):
    """The number of first layers to update in part, if the pixels ``changed`` [N, 1, H, W] change from point
    to point.
    """
    for i, layer in enumerate(layers):
        changed = _reached(layer, changed)
        if changed.double().mean() > WHOLE:
            return i
    return len(layers)


def _reached(layer, changed):
    """The outputs of a layer that depend on changed inputs: [N, 1, H, W] -> [N, 1, OH, OW]."""
    g = layer.geometry
    padded = F.pad(changed.float(), g.padding)
    return F.max_pool2d(padded, g.kernel, g.stride, 0, g.dilation) > 0


def _update(layer, input, output, where):
    """Recompute ``output`` [N, n, OH, OW] of a layer in place at the pixels ``where`` [N, 1, OH, OW]. Their
    patches form a batch of images of the size of the kernel.
    """
    g = layer.geometry
    padded = F.pad(input, g.padding)
    image, plane, row, pixel = padded.stride()
    windows = padded.as_strided(
        (len(padded), *output.shape[2:], padded.shape[1], *g.kernel),
        (image, g.stride[0] * row, g.stride[1] * pixel, plane, g.dilation[0] * row, g.dilation[1] * pixel),
    )
    n, h, w = where[:, 0].nonzero(as_tuple=True)
    if len(n):
        parameters = (layer.reduction_weight, layer.weight, layer.bias)
        found = dau_conv2d(
            windows[n, h, w], *parameters, norm=layer.norm, eps=layer.eps, backend=layer.backend
        )
        output[n, :, h, w] = found.flatten(1)


def _logits(model, encoded):
    return model.head(model.evidence(encoded)) if _encodes_pixels(model) else model(encoded)
