"""The operators that every fused backend shares: ``torch.ops.coda_fast.align``, ``align_backward`` and
``adjoint``.

    align(x, u)           F(x, u)[p, o] = s(|w|^2) <w[p, o], u_p> with w computed from x; ``applied=None``
                          means u = x, the layer itself
    align_backward(g, ..) its gradients; with ``detach`` (explanation mode) only the direct term G(x, g)
    adjoint(x, v)         G(x, v), the transpose of u -> F(x, u), applied to v

``align`` is the DAU convolution as an operator: ``coda_fast.functional.dau_conv2d`` is F(x, x), and its
``detach`` is explanation mode. Each backend chooses how it computes it, in the *contracted* or the
*generated* form.

Each operator is differentiable to any order, in reverse and forward mode and under the transforms of
``torch.func`` (``coda_fast._autograd``), has a fake kernel with true strides (torch.compile, torch.export)
and a FLOP formula, and calls ``coda_fast.backends.<backend>`` for the work. The operators are registered one
level below ``torch.library.custom_op``, whose wrapper imports the compiler at the first eager call, which
would cost seconds and 110 MB for users who never compile.

Autocast: ``coda_fast.functional`` casts before it calls an operator, in the same way for every backend.
Called directly under autocast, ``align`` and ``adjoint`` cast like a convolution (float64 stays);
``align_backward`` takes what ``align`` kept, unchanged.

``keep`` says what ``align`` keeps for the backward pass: "nothing", "norm" (|w|^2, for explanation mode),
"products" (also <w, u>) or "contraction" (also A u, summed over each patch, if the backend has it). All but
"nothing" also keep ``prepared``, the parameters in the backend's own layout, if it has one. What is not kept
is an empty tensor [0]; a backward pass that lacks something computes it again.

The arguments of a schema are those of ``coda_fast._spec.Align``, ``AlignBackward`` and ``Adjoint``.
"""

from __future__ import annotations

import torch

from coda_fast import _autograd, _decompositions
from coda_fast._autocast import cast_as_convolution, without_autocast
from coda_fast._geometry import format_of
from coda_fast._spec import KEEPS, Adjoint, Align, AlignBackward, Gradients, Kept, rebuild
from coda_fast.backends import fused

_PARAMETERS = "Tensor reduction_weight, Tensor weight, Tensor? bias"
_KEPT = "Tensor dot, Tensor square, Tensor contraction, Tensor prepared"
_SPEC = "int[] stride, int[] padding, int[] dilation, str norm, float eps"
_SCHEMAS = {
    "align": f"(Tensor input, Tensor? applied, {_PARAMETERS}, {_SPEC}, bool detach, str keep, str backend) "
    f"-> (Tensor output, {_KEPT})",
    "align_backward": f"(Tensor grad, Tensor input, Tensor? applied, {_PARAMETERS}, {_KEPT}, {_SPEC}, "
    "bool detach, bool[] needs, str backend) -> (Tensor dx, Tensor du, Tensor dB, Tensor dA, Tensor db)",
    "adjoint": f"(Tensor input, Tensor value, {_PARAMETERS}, {_SPEC}, str backend) -> Tensor",
}
_LIBRARY = torch.library.Library("coda_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    # results follow the memory format of the input, so the compiler must not choose another one for the input
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
align, align_backward, adjoint = (getattr(torch.ops.coda_fast, name).default for name in _SCHEMAS)


def _check_keep(keep):
    if keep not in KEEPS:
        raise ValueError(f"keep: expected one of {', '.join(map(repr, KEEPS))}, got {keep!r}")


def _filled(results, like, dtypes):
    """Results with an empty tensor [0] for None, because operators return tensors only."""
    return tuple(
        like.new_empty(0, dtype=dtype) if t is None else t for t, dtype in zip(results, dtypes, strict=True)
    )


def _given(kept):
    """``kept`` with None for [0], as backends take it; [n, 0] belongs to an empty batch and stays."""
    return Kept(*(t if t.numel() or t.dim() > 1 else None for t in kept))


def _kept_dtypes(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Kept(dot=wide, square=wide, contraction=dtype, prepared=dtype)


# -- kernels, the same for every device


def _align_kernel(call):
    _check_keep(call.keep)
    output, kept = fused(call.backend).align(
        call.input, call.applied, call.parameters, call.spec, keep=call.keep
    )
    return output, *_filled(kept, call.input, _kept_dtypes(call.input.dtype))


def _align_backward_kernel(call):
    gradients = fused(call.backend).align_backward(
        call.grad,
        call.input,
        call.applied,
        call.parameters,
        _given(call.kept),
        call.spec,
        detach=call.detach,
        needs=call.needs,
    )
    return _filled(gradients, call.input, [call.input.dtype] * len(gradients))


def _adjoint_kernel(call):
    return fused(call.backend).adjoint(call.input, call.value, call.parameters, call.spec)


# -- fake kernels: shapes, dtypes and strides


def _align_fake(call):
    _check_keep(call.keep)
    input, parameters, spec = call.input, call.parameters, call.spec
    shapes = fused(call.backend).kept_shapes(input, parameters, spec, keep=call.keep)
    size = (input.shape[0], parameters.weight.shape[0], *spec.geometry.output_size(*input.shape[2:]))
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=format_of(input))
    kept = zip(shapes, _kept_dtypes(input.dtype), strict=True)
    return output, *(input.new_empty(shape, dtype=dtype) for shape, dtype in kept)


def _align_backward_fake(call):
    images = (
        None if t is None else torch.empty_like(t, memory_format=format_of(t))
        for t in (call.input, call.applied)
    )
    gradients = Gradients(*images, *fused(call.backend).gradients_like(call.parameters))
    needed = [g if need else None for g, need in zip(gradients, call.needs, strict=True)]
    return _filled(needed, call.input, [call.input.dtype] * len(needed))


def _adjoint_fake(call):
    return torch.empty_like(call.input, memory_format=format_of(call.input))


# -- vmap: several upstream gradients of one input (``is_grads_batched``), for explanations of several classes


def _vmap_align_backward(info, in_dims, *args):
    grad_dim, *others = (dim for dim, arg in zip(in_dims, args, strict=True) if isinstance(arg, torch.Tensor))
    alone = isinstance(grad_dim, int) and all(dim is None for dim in others)
    # the number of active transforms, the last of which is this vmap
    levels = len(torch._C._functorch.get_interpreter_stack() or ())
    tracked = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args)
    watched = levels > 1 or tracked or torch.autograd.forward_ad._current_level >= 0
    call = rebuild(AlignBackward, args)
    if not alone or not call.detach or watched:
        return _one_by_one(align_backward, info, in_dims, args)
    # no gradients through the backend are needed
    with torch.no_grad(), without_autocast(call.grad.device.type):
        values = call.grad.movedim(grad_dim, 0)
        found = fused(call.backend).adjoints(
            values, call.input, call.applied, call.parameters, _given(call.kept), call.spec
        )
    results = [call.input.new_empty(info.batch_size, 0) for _ in Gradients._fields]
    results[0 if call.applied is None else 1] = found
    return tuple(results), (0,) * len(results)


def _vmap_adjoint(info, in_dims, *args):
    return _one_by_one(adjoint, info, in_dims, args)


def _vmap_align(info, in_dims, *args):
    return _one_by_one(align, info, in_dims, args)


def _one_by_one(op, info, in_dims, args):
    """Call the operator for each entry of the batch."""
    entry = lambda i: (
        arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)
    )
    each = [op(*entry(i)) for i in range(info.batch_size)]
    if isinstance(each[0], torch.Tensor):
        return torch.stack(each), 0
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])


# -- registration


def _kernel(kind, function):
    """Run without a graph, and without autocast, which would change the precision that a backend chooses."""

    def run(first, *rest):
        with torch.no_grad(), without_autocast(first.device.type):
            return function(rebuild(kind, (first, *rest)))

    return run


def _fake(kind, function):
    return lambda *args: function(rebuild(kind, args))


def _autocast(op, device_type):
    def run(*args):
        with torch.autocast(device_type, enabled=False):
            return op(*cast_as_convolution(device_type, args))

    # the dispatch key is above autograd, so the casts are differentiated as they are for a convolution
    return run


KERNELS = {
    "align": _kernel(Align, _align_kernel),
    "align_backward": _kernel(AlignBackward, _align_backward_kernel),
    "adjoint": _kernel(Adjoint, _adjoint_kernel),
}
_FAKES = {
    align: _fake(Align, _align_fake),
    align_backward: _fake(AlignBackward, _align_backward_fake),
    adjoint: _fake(Adjoint, _adjoint_fake),
}
_VMAPS = {align: _vmap_align, align_backward: _vmap_align_backward, adjoint: _vmap_adjoint}
for _op, _fake_kernel in _FAKES.items():
    _name = _op._opname
    _LIBRARY.impl(_name, KERNELS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"coda_fast::{_name}", _decompositions.announced(_fake_kernel), lib=_LIBRARY)
    _LIBRARY.impl(_name, _autograd.differentiable(_op), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"coda_fast::{_name}", _VMAPS[_op], lib=_LIBRARY)
    if _op is not align_backward:
        for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _LIBRARY.impl(_name, _autocast(_op, _device_type), _key)
_decompositions.register(_FAKES)
