"""The DAU convolution and its adjoint as functions of tensors, which check arguments, follow autocast, choose
a backend and implement explanation mode.
"""

from __future__ import annotations

import torch

from coda_fast import _flops, _norms, backends, ops
from coda_fast._autocast import autocasting, cast_as_convolution, without_autocast
from coda_fast._geometry import Geometry
from coda_fast._spec import Adjoint, Align, Parameters, Spec, flatten
from coda_fast.backends import factored, reference

NORMS = tuple(_norms.NORMS)
EPS = 1e-6


def dau_conv2d(
    input: torch.Tensor,
    reduction_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    norm: str = "squash",
    eps: float = EPS,
    detach: bool = False,
    backend: str = "auto",
    save_contraction: bool | str = "auto",
) -> torch.Tensor:
    r"""Convolution whose weight each unit computes from the patch it is applied to (Dynamic Alignment Unit).

    For the patch ``x_p`` (d = C kh kw numbers) of output pixel p and the unit o, with rank r
    (arXiv:2104.00032, eq. 1-4):

        z_p = B x_p,   w_po = A_o z_p + b_o,   y_po = s(|w_po|^2) <w_po, x_p>

        norm="squash":  s(q) = sqrt(q) / (1 + q)       |y| <= |x_p|; 0 with zero gradient at w = 0
        norm="l2":      s(q) = 1 / max(sqrt(q), eps)

    Args:
        input: x, [N, C, H, W] or [C, H, W].
        reduction_weight: B, [r, C, kh, kw].
        weight: A, [n, r, C, kh, kw].
        bias: b, [n, C, kh, kw], or None.
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``; padding may be "same" or "valid".
        norm: "squash" or "l2".
        eps: lower bound of the length of w that "l2" divides by; "squash" needs none.
        detach: explanation mode. The output is the same; every ``s * w`` counts as a constant, so the
            gradient of the input is ``dau_conv2d_transpose(input, grad, ...)`` and the parameters get none.
            With ``create_graph=True`` that gradient can itself be differentiated, with respect to the input
            and the parameters.
        backend: "auto", "reference", "factored" or "triton"; see ``coda_fast.backend_info``.
        save_contraction: keep the contraction A x_p of all pixels, [n r, P], for the backward pass, which
            then needs two large matrix products instead of three. It exists only in layers that compute it:
            d > 2 r in the factored backend, r <= 64 and d > 64 in the triton backend. "auto" keeps it on a
            CPU in float32 and float64 if d >= 256 and it takes at most 256 MiB per layer and call
            (``KEPT_DEPTH``, ``KEPT_BYTES`` in ``coda_fast.backends.factored``); the triton backend keeps it
            only on True.

    ``|w|^2`` must be within the range of float32 (of float64 in float64): inputs and parameters that make
    ``|w|`` larger than 1.8e19 give NaN, as infinite ones do; a ``w`` shorter than 1e-18 counts as 0 (``eps``
    should not be smaller than that). For ``|w|`` up to 1e18 and inputs down to 1e-30, results and gradients
    are accurate to the precision of the dtype (``tests/test_extremes.py``). Images in [0, 1] and the weights
    of a trained network are far from these limits. In float16, the triton backend needs ``|x_p| / |z_p|^2``
    below 65504 for correct gradients under "l2": use bfloat16 if ``z`` may be small.

    Returns:
        y, [N, n, OH, OW] (or [n, OH, OW]), in the dtype and memory format of the input. Under autocast
        everything is cast to the autocast dtype first, as for a convolution; internal sums and norms are in
        float32 or wider.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options do not fit.
        BackendUnavailable: the backend cannot run here.

    >>> import torch
    >>> x, B, A = torch.randn(2, 6, 8, 8), torch.randn(4, 6, 3, 3), torch.randn(10, 4, 6, 3, 3)
    >>> dau_conv2d(x, B, A, padding=1).shape
    torch.Size([2, 10, 8, 8])
    """
    given = Parameters(reduction_weight, weight, bias)
    spec = _check(input, given, stride, padding, dilation, norm, eps)
    check_save_contraction(save_contraction)
    kind = input.device.type
    tensors = (input, *given)
    input, *rest = cast_as_convolution(kind, tensors) if autocasting(kind) else tensors
    name = backends.choose(backend, input.device, input.dtype)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    parameters = Parameters(*rest)
    with without_autocast(kind):
        if name != "reference":
            _flops.register_if_counting()
            keep = _keep(batch, parameters, spec, detach, save_contraction, name)
            output = ops.align(*flatten(Align(batch, None, parameters, spec, bool(detach), keep, name)))[0]
        elif detach:
            output = _DynamicLinear.apply(batch, *parameters, spec)
        else:
            output = reference.align(batch, batch, parameters, spec)
    return output if input.dim() == 4 else output.squeeze(0)


def dau_conv2d_transpose(
    input: torch.Tensor,
    value: torch.Tensor,
    reduction_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    norm: str = "squash",
    eps: float = EPS,
    backend: str = "auto",
) -> torch.Tensor:
    r"""The adjoint of a DAU convolution: multiplies ``value`` by the transpose of the weights that ``input``
    generates.

    ``G(x, v) = fold(sum_o v_po s(|w_po|^2) w_po)`` with w computed from ``x``: the transpose of the matrix
    W(x) in ``dau_conv2d(x) = W(x) x``, applied to v. It is linear in ``value`` and differentiable in every
    argument, to any order. ``fold`` is the transpose of taking patches, ``torch.nn.functional.fold``.

    Args:
        input: x, [N, C, H, W] or [C, H, W], from which the weights are computed.
        value: v, [N, n, OH, OW] or [n, OH, OW]: one number for every output of ``dau_conv2d(input, ...)``.
        reduction_weight, weight, bias, stride, padding, dilation, norm, eps, backend: as in ``dau_conv2d``,
            raising the same.

    Returns:
        ``W(x)^T v``, in the shape of ``input``.

    >>> import torch
    >>> x, B, A = torch.randn(2, 6, 8, 8), torch.randn(4, 6, 3, 3), torch.randn(10, 4, 6, 3, 3)
    >>> dau_conv2d_transpose(x, torch.randn(2, 10, 8, 8), B, A, padding=1).shape
    torch.Size([2, 6, 8, 8])
    """
    given = Parameters(reduction_weight, weight, bias)
    spec = _check(input, given, stride, padding, dilation, norm, eps)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"value: expected a tensor, got {type(value).__name__}")
    expected = (*input.shape[:-3], weight.shape[0], *spec.geometry.output_size(*input.shape[-2:]))
    if value.shape != expected:
        raise ValueError(f"value: expected shape {list(expected)}, got {list(value.shape)}")
    if value.dtype != input.dtype and not autocasting(input.device.type):
        raise TypeError(f"value: expected dtype {input.dtype}, that of the input, got {value.dtype}")
    if value.device != input.device:
        raise ValueError(f"value: expected device {input.device}, that of the input, got {value.device}")
    kind = input.device.type
    tensors = (input, value, *given)
    input, value, *rest = cast_as_convolution(kind, tensors) if autocasting(kind) else tensors
    name = backends.choose(backend, input.device, input.dtype)
    batch, values = (input, value) if input.dim() == 4 else (input.unsqueeze(0), value.unsqueeze(0))
    parameters = Parameters(*rest)
    with without_autocast(kind):
        if name != "reference":
            _flops.register_if_counting()
            output = ops.adjoint(*flatten(Adjoint(batch, values, parameters, spec, name)))
        else:
            output = reference.adjoint(batch, values, parameters, spec)
    return output if input.dim() == 4 else output.squeeze(0)


class _DynamicLinear(torch.autograd.Function):
    """Explanation mode of the reference backend: its backward pass is the adjoint, and forward mode treats w
    as a constant.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input, reduction_weight, weight, bias, spec):
        return reference.align(input, input, Parameters(reduction_weight, weight, bias), spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.spec = inputs[4]

    @staticmethod
    def backward(ctx, grad):
        input, *parameters = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[0]:
            with without_autocast(grad.device.type):
                gradient = reference.adjoint(input, grad, Parameters(*parameters), ctx.spec)
        return gradient, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        input, *parameters = (
            None if t is None else torch.autograd.forward_ad.unpack_dual(t, level=0).primal
            for t in ctx.saved_tensors
        )
        # Forward mode is off here; the levels below would take that setting for their own.
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            if tangent is not None:
                return reference.align(input, tangent, Parameters(*parameters), ctx.spec)


def _keep(input, parameters, spec, detach, save_contraction, backend):
    """What the forward pass keeps for a backward pass, if there can be one; in explanation mode only the
    input has a gradient.

    Under saved-tensor hooks both modes save the same. Activation checkpointing may recompute a segment
    outside the mode, and uses only the tensors which that saves (the graph is that of the first call). Such
    hooks are there to save memory, so "auto" does not keep the contraction under them.
    """
    if (
        not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        detach, save_contraction = False, save_contraction is True
    if torch.jit.is_tracing():  # traces with gradients, checks without; both must give the same graph
        return "products"
    wanted = (input,) if detach else (input, *parameters)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)):
        return "nothing"
    if detach:
        return "norm"
    # an exported program has an unknown batch size, on which this decision must not depend
    if save_contraction == "auto":
        save_contraction = (
            backend == "factored"
            and not torch.compiler.is_exporting()
            and factored.worth_keeping(input, parameters, spec)
        )
    return "contraction" if save_contraction else "products"


def _check(input, parameters, stride, padding, dilation, norm, eps) -> Spec:
    reduction_weight, weight, bias = parameters
    named = {"input": input, **parameters._asdict()}
    if bias is None:
        del named["bias"]
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(
                f"{name}: expected a dense tensor, got "
                f"{'a nested one' if tensor.is_nested else tensor.layout}"
            )
    if reduction_weight.dim() != 4:
        raise ValueError(
            f"reduction_weight: expected [rank, C, kh, kw], got shape {list(reduction_weight.shape)}"
        )
    rank, channels, *kernel = reduction_weight.shape
    if weight.dim() != 5 or weight.shape[1:] != (rank, channels, *kernel):
        raise ValueError(
            f"weight: expected [units, {rank}, {channels}, {kernel[0]}, {kernel[1]}], got shape "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0], channels, *kernel):
        raise ValueError(
            f"bias: expected {[weight.shape[0], channels, *kernel]}, got shape {list(bias.shape)}"
        )
    if min(*weight.shape) < 1:
        raise ValueError(
            f"weight: expected at least one unit, rank, channel and tap, got {list(weight.shape)}"
        )
    if input.dim() not in (3, 4) or input.shape[-3] != channels:
        raise ValueError(
            f"input: expected [N, {channels}, H, W] or [{channels}, H, W], got shape {list(input.shape)}"
        )
    check_norm(norm, eps)
    if not input.dtype.is_floating_point:
        raise TypeError(f"input: expected a floating-point tensor, got {input.dtype}")
    autocast = autocasting(input.device.type)
    for name, tensor in named.items():
        if tensor.dtype != input.dtype and not autocast:
            raise TypeError(f"{name}: expected dtype {input.dtype}, that of the input, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: expected device {input.device}, that of the input, got {tensor.device}"
            )
    geometry = Geometry.make(tuple(kernel), stride, padding, dilation)
    geometry.output_size(*input.shape[-2:])
    return Spec(geometry, norm, float(eps))


def check_save_contraction(value: bool | str) -> None:
    """Raise a ValueError unless ``value`` is True, False or "auto"."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f'save_contraction: expected True, False or "auto", got {value!r}')


def check_norm(norm: str, eps: float) -> None:
    """Raise a ValueError unless ``norm`` is known and ``eps`` is a positive number."""
    _norms.named(norm)
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps!r}")
