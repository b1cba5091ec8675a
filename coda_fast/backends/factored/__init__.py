"""The DAU layer computed by library matrix products over small chunks of patches, on any device. The dynamic
weights of all pixels are never in memory at once.

The weight ``w = A z + b`` is affine in ``z = B x``. With ``z~ = [z; 1]`` and ``A~ = [A b]``,

    <w_o, u> = sum_k z_k (A_ok . u) + b_o . u      one matrix product with n r rows, contracted with z
    |w_o|^2  = z~^T (A~_o A~_o^T) z~               a quadratic form: Gram matrices times the numbers z_k z_l

so ``w`` itself is needed only for the few pixels and units where it nearly cancels (``squared_norm.Gram``).
This *contracted* form pays if there are many pixels and d is large compared with r, because the Gram matrices
are made once for all pixels and the contraction has r numbers where w has d. Otherwise w is *generated*: in
the forward pass if ``Layer._worth_generating`` says so, in the backward pass if d <= 2 r. Patches are
gathered a chunk at a time, so that every intermediate stays in cache.

The forward pass keeps <w, u> and |w|^2, two numbers for every unit and pixel, and the contraction A u if
``keep`` requests it. The backward pass recomputes the rest:

    gs  = g s(q),   t = 2 g <w, u> s'(q)                     g: upstream gradient, q = |w|^2
    du  = (gs (x) z~) A~
    dA~ = (gs (x) z~)^T u + (sum_p t z~ z~^T) A~
    dz  = sum_o gs_o A_o u + t_o A_o A~_o^T z~

Pixels are columns of matrices. A patch is laid out as (C, kh, kw), like the parameters, so that these need no
copy. (x) is the outer product, * elsewhere any shape; P counts all output pixels, p those of a chunk.
"""

from __future__ import annotations

import math

import torch

from coda_fast._spec import KEEPS, Gradients, Kept, Parameters, Spec
from coda_fast.backends.factored.layer import Layer, has_contraction

# save_contraction="auto" keeps a contraction of at most KEPT_BYTES if patches have at least KEPT_DEPTH
# numbers: each number of a contraction saves that many multiplications, and the cost to write and read it
# does not depend on them.
KEPT_BYTES = 256 << 20
KEPT_DEPTH = 256


def align(
    input: torch.Tensor, applied: torch.Tensor | None, parameters: Parameters, spec: Spec, *, keep: str
) -> tuple[torch.Tensor, Kept]:
    """See ``coda_fast.backends.Backend.align``."""
    return Layer.make(input, parameters, spec).align(input, applied, keep)


def align_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    applied: torch.Tensor | None,
    parameters: Parameters,
    kept: Kept,
    spec: Spec,
    *,
    detach: bool,
    needs: Gradients,
) -> Gradients:
    """See ``coda_fast.backends.Backend.align_backward``."""
    layer = Layer.make(input, parameters, spec)
    if not detach:
        return layer.align_backward(grad, input, applied, kept, needs)
    direct = layer.adjoint(input, grad, input if applied is None else applied, kept.square)
    return Gradients(input=direct) if applied is None else Gradients(applied=direct)


def adjoint(input: torch.Tensor, value: torch.Tensor, parameters: Parameters, spec: Spec) -> torch.Tensor:
    """See ``coda_fast.backends.Backend.adjoint``."""
    return Layer.make(input, parameters, spec).adjoint(input, value, input)


def adjoints(
    values: torch.Tensor,
    input: torch.Tensor,
    applied: torch.Tensor | None,
    parameters: Parameters,
    kept: Kept,
    spec: Spec,
) -> torch.Tensor:
    """See ``coda_fast.backends.Backend.adjoints``."""
    layer = Layer.make(input, parameters, spec)
    return layer.adjoints(input, values, input if applied is None else applied, kept.square)


def kept_shapes(input: torch.Tensor, parameters: Parameters, spec: Spec, *, keep: str) -> Kept:
    """See ``coda_fast.backends.Backend.kept_shapes``."""
    units, rank, *window = parameters.weight.shape
    height, width = spec.geometry.output_size(*input.shape[2:])
    pixels, wanted = input.shape[0] * height * width, KEEPS[keep]
    contracted = wanted.contraction and has_contraction(rank, math.prod(window), input.dtype)
    return Kept(
        dot=(units, pixels) if wanted.dot else (0,),
        square=(units, pixels) if wanted.square else (0,),
        contraction=(units * rank, pixels) if contracted else (0,),
        prepared=(0,),  # the parameters are used as they are
    )


def gradients_like(parameters: Parameters) -> Parameters:
    """See ``coda_fast.backends.Backend.gradients_like``."""
    like = lambda p: None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
    return Parameters(*map(like, parameters))


def worth_keeping(input: torch.Tensor, parameters: Parameters, spec: Spec) -> bool:
    """Whether ``save_contraction="auto"`` keeps the contraction of a layer."""
    units, rank, *window = parameters.weight.shape
    depth = math.prod(window)
    if input.device.type != "cpu" or depth < KEPT_DEPTH or not has_contraction(rank, depth, input.dtype):
        return False
    height, width = spec.geometry.output_size(*input.shape[2:])
    return input.shape[0] * height * width * units * rank * input.element_size() <= KEPT_BYTES
