"""Exact decomposition of predictions: a logit as a sum of contributions of pixels, or of a layer's inputs."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType

import torch

from coda_fast import safety
from coda_fast._autocast import wide
from coda_fast._classes import as_classes, check_range
from coda_fast.dynamic_linear import DynamicLinear, gathered, need_network
from coda_fast.explanation import Explanation
from coda_fast.nn import DAUConv2d

__all__ = ["MEMORY_BUDGET", "Explanation", "PixelRangeWarning", "explain"]

MEMORY_BUDGET = 1 << 30


def explain(
    model: DynamicLinear,
    images: torch.Tensor,
    target: int | Sequence | torch.Tensor | None = None,
    *,
    layer: int | str | DAUConv2d | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Explanation:
    """Decompose logits of ``model`` exactly into contributions; also available as ``model.explain``.

    ``contribution_map = sum_channels [W_{0->L}(x)]_c * x`` (arXiv:2104.00032, eq. 11), including 1/T. In a
    network with a stem (``coda_fast.HybridCoDANet``), x are the encoded features at the joint.

    Args:
        model: a CoDANet or another ``DynamicLinear``, or a wrapper of one (``coda_fast.unwrap``). One sharded
            by FSDP2 is gathered: every process must call this.
        images: [N, C, H, W] in [0, 1], any size.
        target: None: the predicted class; an int: that class for every image; N classes: one for each image;
            [N, K] classes: several for each image.
        layer: decompose with respect to the input of this DAU layer instead of the encoded image: its index
            in a CoDANet, its name in other networks, or the module.
        memory_budget: bytes that one chunk of images may take for activations and results; a chunk has at
            least one image and class.

    It leaves no graph, hook, changed mode or ``.grad`` behind, and works under ``torch.no_grad`` and
    ``inference_mode``.

    Raises:
        ValueError, TypeError: images have the wrong shape or NaN or infinite values, targets or the layer do
            not exist, some paths from image to logits bypass the layer, logits are not finite, or a stem is
            in a mode in which its features depend on the other images.

    Issues a ``PixelRangeWarning``, once, if pixels leave [0, 1] by more than rounding.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> e = model.explain(torch.rand(2, 1, 8, 8), target=[[3, 7], [1, 2]])
    >>> e.contribution_map.shape
    torch.Size([2, 2, 8, 8])
    """
    model = need_network(model)
    model.check_images(images)
    model.check_mode()
    largest = _check_pixels(images, model.value_range)
    index, chosen = model.find_layer(layer)
    names, model = model.class_names, gathered(model)
    if chosen is not None:
        chosen = model.find_layer(index)[1]  # of the gathered model
    targets = None if target is None else _targets(target, len(images), model.num_classes, images.device)
    classes = 1 if targets is None else targets.shape[1]
    fixed, each = _bytes_per_image(model, images)
    step = max(1, memory_budget // (fixed + classes * each))
    together = classes if step > 1 else min(classes, max(1, (memory_budget - fixed) // each))  # of one image
    parts = []
    for start in range(0, max(1, len(images)), step):
        chunk = slice(start, start + step)
        parts.append(
            _explain_chunk(
                model, images[chunk], None if targets is None else targets[chunk], chosen, together
            )
        )
    found = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    finite = torch.isfinite(found[0]).all(1)
    if not finite.all():
        i = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"model: expected finite logits, got {found[0][i].tolist()[:4]} for image {i}; pixels reach "
            f"{largest:.3g}, and |w|^2 or a sum "
            f"leaves the range of {str(images.dtype).removeprefix('torch.')}, or weights are not finite"
        )
    logits, classes, weight, contributions, maps, error = found
    return Explanation(
        logits=logits,
        target=classes,
        dynamic_weight=weight,
        contributions=contributions,
        contribution_map=maps,
        completeness_error=error,
        layer=index,
        images=None if model.value_range is None else images.detach(),
        logit_bias=model.logit_bias,
        class_names=None if names is None else tuple(names),
        placement=model.placement(index, *images.shape[2:]),
        stem=model.stem_name,
        signed=model.signed,
    )


class PixelRangeWarning(UserWarning):
    """Pixels leave [0, 1] by more than rounding; issued once per process."""


_WARNED = threading.Event()


def _check_pixels(images, value_range) -> float:
    """The largest absolute pixel; ValueError for NaN and infinity, one warning if pixels leave [0, 1], unless
    they may.
    """
    if not images.numel():
        return 0.0
    low, high = torch.stack(images.detach().aminmax()).tolist()  # one transfer from the device
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images: expected finite values, got NaN or infinity")
    slack = max(1e-4, 2 * torch.finfo(images.dtype).eps)
    if value_range is not None and (low < -slack or high > 1 + slack) and not _WARNED.is_set():
        if -0.5 < low and high < 1.5:
            cause = "did resizing or added noise overshoot? Clamp them, if that is not meant"
        elif low < -slack:
            cause = "were they normalised by mean and standard deviation? Give them as they were before"
        else:
            cause = "are they 0 to 255? Divide them by 255"
        warnings.warn(
            f"images: expected pixels in [0, 1], which the encoding [x, 1 - x] is made for, got {low:.3g} "
            f"to {high:.3g}; {cause}. This is "
            f"said once.",
            PixelRangeWarning,
            stacklevel=_outside(),
        )
        _WARNED.set()  # only now: if warnings are errors, every call raises
    return max(abs(low), abs(high))


def _outside() -> int:
    """The ``stacklevel`` for a warning of the calling function: that of the first frame outside coda_fast."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "coda_fast":
        level, frame = level + 1, frame.f_back
    return level


def _explain_chunk(model, images, targets, layer, together):
    # These tensors are differentiated, so they must not be inference tensors, whatever the caller's mode.
    with torch.inference_mode(False), torch.no_grad():
        encoded = model.encoder(images.clone())
    with torch.inference_mode(False), torch.enable_grad():
        entering, evidence = model.cut(encoded, layer)
        logits = model.head(evidence.detach())
        targets = logits.argmax(1, keepdim=True) if targets is None else targets.clone()
        # one backward pass for many classes, because they share the weights of each layer
        one_hot = torch.zeros(targets.shape[1], *logits.shape, dtype=evidence.dtype, device=evidence.device)
        one_hot.scatter_(2, targets.t().unsqueeze(2), 1)

        def backward(chosen):  # the head sums over pixels
            return torch.autograd.grad(
                evidence, entering, chosen[:, :, None, None].expand_as(evidence), retain_graph=True
            )[0]

        weight = torch.func.vmap(backward, out_dims=1, chunk_size=together)(one_hot)
        entering = wide(entering.detach())
    weight = wide(weight) / model.temperature  # last: float16 holds 1 / T = 1e-5 to two digits
    contributions = weight * entering.unsqueeze(1)
    contribution_map = contributions.sum(2)
    total = contributions.sum((2, 3, 4), dtype=torch.float64) + model.logit_bias
    error = (total - logits.gather(1, targets).double()).abs()
    return logits, targets, weight, contributions, contribution_map, error


def _targets(target, batch, classes, device):
    """Any accepted form of ``target`` as [N, K]."""
    if isinstance(target, torch.Tensor):
        as_classes(target, "target")  # checked before it is copied
    try:
        tensor = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target: expected an int, [N] or [N, K] ints, got {target!r} ({error})") from None
    if not isinstance(target, torch.Tensor) and not tensor.numel():
        tensor = tensor.long()  # torch makes floats of an empty list
    tensor = as_classes(tensor, "target")
    if tensor.dim() == 0:
        tensor = tensor.expand(batch)
    if tensor.dim() not in (1, 2) or len(tensor) != batch or tensor.shape[1:].numel() == 0:
        raise ValueError(
            f"target: expected an int, [{batch}] or [{batch}, K] classes, got shape {list(tensor.shape)}"
        )
    check_range(tensor, classes, "target")
    return tensor.reshape(batch, -1)


def explanation_memory(model: DynamicLinear, height: int, width: int, classes: int = 1) -> int:
    """An estimate of the peak memory, in bytes, of explaining ``classes`` classes of one image."""
    parameter = next(model.parameters())
    fixed, each = _bytes_per_image(
        model, torch.empty(1, model.image_channels, height, width, dtype=parameter.dtype, device="meta")
    )
    size = model.encoded_channels * math.prod(model.encoded_size(height, width))
    results = 3 * size * max(4, parameter.element_size())
    return fixed + each + (classes - 1) * results  # backward passes run one class after the other


def check_explainable(model: DynamicLinear, height: int, width: int, name: str, classes: int = 1) -> None:
    """Check that an image of this size can be explained; messages call it ``name``.

    Raises:
        TooLarge: an explanation of ``classes`` classes does not fit in memory. ValueError: the image is
            smaller than the kernel of a layer.
    """
    try:
        needed = explanation_memory(model, height, width, classes)
    except ValueError as error:
        raise ValueError(f"{name}: {width} x {height} pixels: {error}") from None
    safety.need_memory(
        f"{name}: an explanation of {width} x {height} pixels", needed, next(model.parameters()).device
    )


def batch_within(model: DynamicLinear, height: int, width: int, most: int, classes: int = 1) -> int:
    """The largest batch of at most ``most`` images whose explanation stays within ``MEMORY_BUDGET``; at
    least one image.
    """
    return max(1, min(most, MEMORY_BUDGET // max(1, explanation_memory(model, height, width, classes))))


def _bytes_per_image(model, images) -> tuple[int, int]:
    """(bytes per image, further bytes per image and class). The first are for the activations that a forward
    pass in explanation mode keeps: each layer's input and output, <w, x> and |w|^2. The second are for the
    results and the largest pair of a layer's input and output gradients.
    """
    height, width = images.shape[2:]
    entering = model.encoded_channels * math.prod(model.encoded_size(height, width))
    kept, results, largest = entering, 3 * entering, 0
    for units, rows, columns in model.layer_sizes(height, width).values():
        leaving = units * rows * columns
        kept, largest, entering = kept + 4 * leaving, max(largest, entering + leaving), leaving
    size = max(4, images.element_size())
    return kept * size, (results + 2 * largest) * size
