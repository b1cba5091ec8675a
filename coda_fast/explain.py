"""Exact decomposition of predictions: a logit as the sum of the contributions of pixels (or of any layer's inputs)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from coda_fast._autocast import wide
from coda_fast._classes import as_classes, check_range
from coda_fast._geometry import integer
from coda_fast._wrappers import gathered, need_network, unwrap
from coda_fast.nn import DAUConv2d, explanation_mode

if TYPE_CHECKING:
    from coda_fast.models import CoDANet

MEMORY_BUDGET = 1 << 30


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a network gave its logits; N images, K explained classes each, all tensors on the images' device.

    With ``layer=None`` (or 0), C = 6 for colour images: red, green, blue, then 1 - red, 1 - green, 1 - blue. With ``layer=l`` C, H, W
    are those of the activations that enter layer l.

    Attributes:
        logits: [N, classes], in the dtype of the network; the rest is in float32 at least.
        target: explained classes, [N, K].
        dynamic_weight: ``[W(x)]_c / T``: the row of the global linear map that gives each logit, [N, K, C, H, W].
        contributions: ``dynamic_weight * activations``, in logits, [N, K, C, H, W].
        contribution_map: contributions summed over channels, [N, K, H, W].
        completeness_error: ``|sum of contributions + logit bias - logit|``, in logits, [N, K]: rounding, below 1e-6 (float32), 1e-14
            (float64) or 2e-2 (bfloat16) of the logit plus the sum of absolute contributions.
        layer: index of the DAU layer whose inputs are the terms of the decomposition; 0: the encoded image.
    """

    logits: torch.Tensor
    target: torch.Tensor
    dynamic_weight: torch.Tensor
    contributions: torch.Tensor
    contribution_map: torch.Tensor
    completeness_error: torch.Tensor
    layer: int


def explain(
    model: CoDANet,
    images: torch.Tensor,
    target: int | Sequence | torch.Tensor | None = None,
    *,
    layer: int | DAUConv2d | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Explanation:
    """Decompose logits of ``model`` exactly into contributions; also available as ``model.explain``.

    ``contribution_map = sum_channels [W_{0->L}(x)]_c * x`` (arXiv:2104.00032, eq. 11), with the 1/T included.

    Args:
        model: a CoDANet, or a wrapper of one (``coda_fast.unwrap``). One sharded by FSDP2 is gathered: every process must call this.
        images: [N, C, H, W] in [0, 1], any size.
        target: None: the predicted class; an int: that class for every image; N classes: one for each image; [N, K] classes:
            several for each image.
        layer: decompose in terms of what enters this DAU layer (its index or the module) instead of the encoded image.
        memory_budget: bytes that one chunk of images may take for activations and results; at least one image and class is taken.

    Leaves no graph, no hook, no changed mode and no ``.grad`` behind, and works under ``torch.no_grad`` and ``inference_mode``.

    Raises:
        ValueError, TypeError: images of the wrong shape or with NaN or infinite values, targets or layers that do not exist.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> e = model.explain(torch.rand(2, 1, 8, 8), target=[[3, 7], [1, 2]])
    >>> e.contribution_map.shape
    torch.Size([2, 2, 8, 8])
    """
    model = need_network(model)
    model.check_images(images)
    if not torch.isfinite(images).all():
        raise ValueError("images: expected finite values, got NaN or infinity")
    index = _layer_index(model, layer)
    model = gathered(model)
    targets = None if target is None else _targets(target, len(images), model.num_classes, images.device)
    classes = 1 if targets is None else targets.shape[1]
    fixed, each = _bytes_per_image(model, images)
    step = max(1, memory_budget // (fixed + classes * each))
    together = classes if step > 1 else min(classes, max(1, (memory_budget - fixed) // each))  # of one image
    parts = []
    for start in range(0, max(1, len(images)), step):
        chunk = slice(start, start + step)
        parts.append(_explain_chunk(model, images[chunk], None if targets is None else targets[chunk], index, together))
    return Explanation(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), layer=index)


def _explain_chunk(model, images, targets, index, together):
    # not inference tensors, whatever the caller's mode: they are differentiated
    with torch.inference_mode(False), torch.no_grad():
        entering = model.run_layers(model.encoder(images.clone()), 0, index)
    with torch.inference_mode(False), torch.enable_grad(), explanation_mode(model):
        entering = entering.detach().requires_grad_()
        evidence = model.run_layers(entering, index)
        logits = model.head(evidence.detach())
        targets = logits.argmax(1, keepdim=True) if targets is None else targets.clone()
        # many classes in one backward pass: the weights of a layer are the same for them
        one_hot = torch.zeros(targets.shape[1], *logits.shape, dtype=evidence.dtype, device=evidence.device)
        one_hot.scatter_(2, targets.t().unsqueeze(2), 1)

        def backward(chosen):  # the head sums over pixels
            return torch.autograd.grad(evidence, entering, chosen[:, :, None, None].expand_as(evidence), retain_graph=True)[0]

        weight = torch.func.vmap(backward, out_dims=1, chunk_size=together)(one_hot)
        entering = wide(entering.detach())
    weight = wide(weight) / model.temperature  # last: float16 holds 1 / T = 1e-5 to two digits
    contributions = weight * entering.unsqueeze(1)
    contribution_map = contributions.sum(2)
    total = contributions.sum((2, 3, 4), dtype=torch.float64) + model.logit_bias
    error = (total - logits.gather(1, targets).double()).abs()
    return logits, targets, weight, contributions, contribution_map, error


def _layer_index(model, layer):
    count = len(model.layers)
    layer = unwrap(layer)
    if isinstance(layer, DAUConv2d):
        for index, candidate in enumerate(model.layers):
            if unwrap(candidate) is layer:
                return index
        raise ValueError("layer: expected a DAU layer of this model, got one of another")
    if layer is None:
        return 0
    try:
        layer = integer(layer)
    except TypeError:
        raise TypeError(f"layer: expected an int, a DAUConv2d of the model or None, got {type(layer).__name__}") from None
    if not -count <= layer < count:
        raise ValueError(f"layer: expected an index from {-count} to {count - 1}, got {layer}")
    return layer % count


def _targets(target, batch, classes, device):
    """Any legal form of targets as [N, K]."""
    if isinstance(target, torch.Tensor):
        as_classes(target, "target")  # before a copy of it
    try:
        tensor = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target: expected an int, [N] or [N, K] ints, got {target!r} ({error})") from None
    if not isinstance(target, torch.Tensor) and not tensor.numel():
        tensor = tensor.long()  # of an empty list, torch makes floats
    tensor = as_classes(tensor, "target")
    if tensor.dim() == 0:
        tensor = tensor.expand(batch)
    if tensor.dim() not in (1, 2) or len(tensor) != batch or tensor.shape[1:].numel() == 0:
        raise ValueError(f"target: expected an int, [{batch}] or [{batch}, K] classes, got shape {list(tensor.shape)}")
    check_range(tensor, classes, "target")
    return tensor.reshape(batch, -1)


def _bytes_per_image(model, images) -> tuple[int, int]:
    """Bytes that an image takes, whatever is explained, and for each class besides: activations that a forward pass in explanation mode
    keeps (what enters each layer, its output, <w, x> and |w|^2); results, and the largest pair of values on their way back.
    """
    height, width = images.shape[2:]
    entering = 2 * images.shape[1] * height * width
    kept, results, largest = entering, 3 * entering, 0
    for layer in model.layers:
        height, width = layer.geometry.output_size(height, width)
        leaving = layer.out_channels * height * width
        kept, largest, entering = kept + 4 * leaving, max(largest, entering + leaving), leaving
    size = max(4, images.element_size())
    return kept * size, (results + 2 * largest) * size
