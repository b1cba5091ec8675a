"""The operators that every fused backend shares: ``torch.ops.coda_fast.align``, ``align_backward`` and
``adjoint``.

    align(x, u)
        F(x, u)[p, o] = s(|w|^2) <w[p, o], u_p> with w computed from x; ``applied=None`` is
        u = x, the layer itself
    align_backward(g, ..) its gradients; with ``detach`` (explanation mode) only the direct term G(x, g)
    adjoint(x, v)         G(x, v), the transpose of u -> F(x, u)

Each is differentiable to any order, in reverse and forward mode and under the transforms of ``torch.func``,
has a fake kernel with true strides (torch.compile, torch.export) and a FLOP formula, and hands the work to
``coda_fast.backends.<backend>``. Registered one level below ``torch.library.custom_op``, whose wrapper
imports the compiler at the first eager call: seconds and 110 MB for those who never compile.

Autocast: ``coda_fast.functional`` casts before it calls, the same for every backend. Called directly under
autocast, ``align`` and ``adjoint`` cast like a convolution (float64 stays); ``align_backward`` takes what
``align`` left, as it is.

``keep`` says what ``align`` leaves for the backward pass: "nothing", "norm" (|w|^2: explanation mode),
"products" (and <w, u>) or "contraction" (and sum over the patch of A u, where the backend has it). What is
not kept is an empty tensor [0]; a backward pass that misses something computes it again. ``prepared`` goes
with it: the parameters in the backend's own layout, where it has one.
"""

from __future__ import annotations

import contextlib
import importlib

import torch

from coda_fast import _decompositions, _flops
from coda_fast._autocast import cast_as_convolution, without_autocast
from coda_fast._geometry import Geometry
from coda_fast.backends import reference
from coda_fast.backends.factored import format_of

KEEPS = ("nothing", "norm", "products", "contraction")
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, str norm, float eps"
_LAYER = "Tensor reduction_weight, Tensor weight, Tensor? bias"
_SCHEMAS = {
    "align": f"(Tensor input, Tensor? applied, {_LAYER}, {_GEOMETRY}, bool detach, str keep, str backend) "
    "-> (Tensor output, Tensor dot, Tensor square, Tensor contraction, Tensor prepared)",
    "align_backward": f"(Tensor grad, Tensor input, Tensor? applied, {_LAYER}, Tensor dot, Tensor "
    "square, Tensor "
    "contraction, "
    f"Tensor prepared, {_GEOMETRY}, bool detach, bool[] needs, str backend) -> (Tensor dx, Tensor du, "
    "Tensor dB, Tensor dA, Tensor db)",
    "adjoint": f"(Tensor input, Tensor value, {_LAYER}, {_GEOMETRY}, str backend) -> Tensor",
}
_LIBRARY = torch.library.Library("coda_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    # our results follow the input's memory format: the compiler must not choose another one for it
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
align, align_backward, adjoint = (getattr(torch.ops.coda_fast, name).default for name in _SCHEMAS)


def _geometry(weight, stride, padding, dilation) -> Geometry:
    return Geometry(tuple(weight.shape[3:]), tuple(stride), tuple(dilation), tuple(padding))


def _backend(name):
    if name not in ("factored", "triton"):
        raise ValueError(f"backend: expected 'factored' or 'triton', got {name!r}")
    return importlib.import_module(f"coda_fast.backends.{name}")


def _check_keep(keep):
    if keep not in KEEPS:
        raise ValueError(f"keep: expected one of {', '.join(map(repr, KEEPS))}, got {keep!r}")


# -- kernels, the same for every device
# -----------------------------------------------------------------------------------------------


def _kernel(function):
    """Run without a graph and without autocast, which would undo the precision that a backend chooses."""

    def run(first, *rest):
        with torch.no_grad(), without_autocast(first.device.type):
            return function(first, *rest)

    return run


def _filled(results, like, dtypes):
    """Operators return tensors: [0] stands for None."""
    return tuple(
        like.new_empty(0, dtype=dtype) if t is None else t for t, dtype in zip(results, dtypes, strict=True)
    )


def _kept_dtypes(dtype):
    """Of <w, u>, |w|^2, the contraction and the parameters as the backend has prepared them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return wide, wide, dtype, dtype


@_kernel
def _align_kernel(
    input,
    applied,
    reduction_weight,
    weight,
    bias,
    stride,
    padding,
    dilation,
    norm,
    eps,
    detach,
    keep,
    backend,
):
    _check_keep(keep)
    geometry = _geometry(weight, stride, padding, dilation)
    output, *kept = _backend(backend).align(
        input, applied, reduction_weight, weight, bias, geometry, norm, eps, keep
    )
    return output, *_filled(kept, input, _kept_dtypes(input.dtype))


@_kernel
def _align_backward_kernel(
    grad,
    input,
    applied,
    reduction_weight,
    weight,
    bias,
    dot,
    square,
    contraction,
    prepared,
    stride,
    padding,
    dilation,
    norm,
    eps,
    detach,
    needs,
    backend,
):
    geometry = _geometry(weight, stride, padding, dilation)
    dot, square, contraction = (t if t.dim() > 1 else None for t in (dot, square, contraction))
    prepared = prepared if prepared.numel() else None
    gradients = _backend(backend).align_backward(
        grad,
        input,
        applied,
        reduction_weight,
        weight,
        bias,
        dot,
        square,
        contraction,
        prepared,
        geometry,
        norm,
        eps,
        detach,
        tuple(needs),
    )
    return _filled(gradients, input, [input.dtype] * 5)


@_kernel
def _adjoint_kernel(
    input, value, reduction_weight, weight, bias, stride, padding, dilation, norm, eps, backend
):
    geometry = _geometry(weight, stride, padding, dilation)
    return _backend(backend).adjoint(input, value, reduction_weight, weight, bias, geometry, norm, eps)


# -- fake kernels: shapes, dtypes and strides
# ------------------------------------------------------------------------------------------


def _align_fake(
    input,
    applied,
    reduction_weight,
    weight,
    bias,
    stride,
    padding,
    dilation,
    norm,
    eps,
    detach,
    keep,
    backend,
):
    _check_keep(keep)
    geometry = _geometry(weight, stride, padding, dilation)
    batch, units, size = input.shape[0], weight.shape[0], geometry.output_size(*input.shape[2:])
    shapes = _backend(backend).kept_shapes(input, weight, bias, batch * size[0] * size[1], geometry, keep)
    output = torch.empty(
        batch, units, *size, dtype=input.dtype, device=input.device, memory_format=format_of(input)
    )
    return output, *(
        input.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, _kept_dtypes(input.dtype), strict=True)
    )


def _align_backward_fake(
    grad,
    input,
    applied,
    reduction_weight,
    weight,
    bias,
    dot,
    square,
    contraction,
    prepared,
    stride,
    padding,
    dilation,
    norm,
    eps,
    detach,
    needs,
    backend,
):
    images = [
        None if t is None else torch.empty_like(t, memory_format=format_of(t)) for t in (input, applied)
    ]
    gradients = [*images, *_backend(backend).gradients_like(reduction_weight, weight, bias)]
    return _filled(
        [g if need else None for g, need in zip(gradients, needs, strict=True)], input, [input.dtype] * 5
    )


def _adjoint_fake(input, value, *rest):
    return torch.empty_like(input, memory_format=format_of(input))


# -- derivatives
# ------------------------------------------------------------------------------------------------------------


def _setup_align(ctx, inputs, output):
    ctx.save_for_forward(*inputs[:5])
    (
        input,
        applied,
        reduction_weight,
        weight,
        bias,
        *geometry,
        norm,
        eps,
        ctx.detach,
        ctx.keep,
        ctx.backend,
    ) = inputs
    ctx.geometry = (*geometry, norm, eps)
    ctx.save_for_backward(input, applied, reduction_weight, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_align(ctx, grad, *_):
    *tensors, dot, square, contraction, prepared = ctx.saved_tensors
    needs = _needed(ctx.needs_input_grad[1:], tensors, ctx.detach)
    if grad is None or not any(needs):
        return None
    with without_autocast(grad.device.type):
        enough = "norm" if ctx.detach else "products"
        if KEEPS.index(ctx.keep) < KEEPS.index(enough):
            with torch.no_grad():
                _, dot, square, contraction, prepared = align(
                    *tensors, *ctx.geometry, ctx.detach, enough, ctx.backend
                )
        found = align_backward(
            grad, *tensors, dot, square, contraction, prepared, *ctx.geometry, ctx.detach, needs, ctx.backend
        )
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _jvp_of_align(ctx, *tangents):
    """In explanation mode w counts as a constant in forward mode too: F(x, u')."""
    tensors, geometry = _primals(ctx)
    if ctx.detach:
        x, u, *parameters = tensors
        direction = tangents[0] if u is None else tangents[1]
        direction = torch.zeros_like(x) if direction is None else direction
        found = align(x, direction, *parameters, *ctx.geometry, False, "nothing", ctx.backend)[0]
    else:
        found = _align_jvp(tensors, tangents, geometry)
    return found, None, None, None, None


def _align_jvp(tensors, tangents, geometry):
    (x, u, *parameters), (of_x, of_u, *of_parameters) = tensors, tangents[:5]
    u, of_u = (x, of_x) if u is None else (u, of_u)
    return reference.align_jvp((x, u, *parameters), (of_x, of_u, *of_parameters), *geometry)


def _needed(needs, tensors, detach):
    """Which gradients ``align`` has: in explanation mode only that of u, which is x where u is not given."""
    shared = tensors[1] is None
    return [needs[0] and (shared or not detach), needs[1], *(need and not detach for need in needs[2:5])]


def _setup_align_backward(ctx, inputs, output):
    ctx.save_for_forward(*inputs[:6])
    grad, *tensors, _, _, _, _, stride, padding, dilation, norm, eps, ctx.detach, ctx.needs, ctx.backend = (
        inputs
    )
    ctx.geometry = (stride, padding, dilation, norm, eps)
    ctx.save_for_backward(grad, *tensors)
    ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
    ctx.set_materialize_grads(False)


def _backward_of_align_backward(ctx, *upstream):
    grad, *tensors = ctx.saved_tensors
    upstream = [h if need else None for h, need in zip(upstream, ctx.needs, strict=True)]
    needs = ctx.needs_input_grad[1:7]
    if all(h is None for h in upstream):
        return None
    with without_autocast(grad.device.type):
        if not ctx.detach:
            return _second_derivatives(grad, tensors, upstream, needs, ctx.geometry)
        # the direct term is G(x, grad), whatever u is
        x, _, *parameters = tensors
        h = upstream[0] if tensors[1] is None else upstream[1]
        dx, dgrad, *others = _adjoint_derivatives(
            h, x, grad, parameters, (needs[1], needs[0], *needs[3:]), ctx.geometry, ctx.backend
        )
        return dgrad, dx, None, *others


def _setup_adjoint(ctx, inputs, output):
    ctx.save_for_forward(*inputs[:5])
    *tensors, stride, padding, dilation, norm, eps, ctx.backend = inputs
    ctx.geometry = (stride, padding, dilation, norm, eps)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_of_adjoint(ctx, h):
    input, value, *parameters = ctx.saved_tensors
    if h is None:
        return None
    with without_autocast(h.device.type):
        return _adjoint_derivatives(
            h, input, value, parameters, ctx.needs_input_grad[1:6], ctx.geometry, ctx.backend
        )


def _adjoint_derivatives(h, input, value, parameters, needs, geometry, backend):
    """(dx, dv, dB, dA, db) of <h, G(x, v)> = <v, F(x, h)>: dv is F itself, the rest is the backward of F
    without its direct term.
    """
    others = [needs[0], False, *needs[2:]]
    dv, *kept = align(
        input, h, *parameters, *geometry, False, "products" if any(others) else "nothing", backend
    )
    dx, _, *rest = (
        align_backward(value, input, h, *parameters, *kept, *geometry, False, others, backend)
        if any(others)
        else (None,) * 5
    )
    return [g if need else None for g, need in zip((dx, dv, *rest), needs, strict=True)]


def _second_derivatives(grad, tensors, upstream, needs, geometry):
    """Gradients of <upstream, gradients of L> in (v, x, u, B, A, b), L = <v, F(x, u)>, by the definition,
    which materialises w.

    Second derivatives commute, so those in what F depends on are the directional derivative of the gradients
    along ``upstream``; that in v is the directional derivative of F.
    """
    *window, norm, eps = geometry
    rest = (_geometry(tensors[3], *window), norm, eps)
    of_grad = _align_jvp(tensors, upstream, rest) if needs[0] else None
    found = (
        reference.gradients_jvp((grad, *tensors), (None, *upstream), *rest) if any(needs[1:]) else (None,) * 5
    )
    return [g if need else None for g, need in zip((of_grad, *found), needs, strict=True)]


def _jvp_of_align_backward(ctx, *tangents):
    (grad, *tensors), geometry = _primals(ctx)
    of_grad, *of_tensors = tangents[:6]
    if ctx.detach:  # the direct term is G(x, grad), whatever u is
        (x, u, *parameters), (of_x, _, *of_parameters) = tensors, of_tensors
        found = reference.adjoint_jvp((x, grad, *parameters), (of_x, of_grad, *of_parameters), *geometry)
        place = 0 if u is None else 1
        return tuple(found if ctx.needs[i] and i == place else None for i in range(5))
    found = reference.gradients_jvp((grad, *tensors), tangents[:6], *geometry)
    return tuple(t if need else None for t, need in zip(found, ctx.needs, strict=True))


def _jvp_of_adjoint(ctx, *tangents):
    tensors, geometry = _primals(ctx)
    return reference.adjoint_jvp(tensors, tangents[:5], *geometry)


def _primals(ctx):
    """The saved tensors without their tangents, and (geometry, norm, eps) as backends take them."""
    strip = lambda t: torch.autograd.forward_ad.unpack_dual(t, level=0).primal
    tensors = [None if t is None else strip(t) for t in ctx.saved_tensors]
    *window, norm, eps = ctx.geometry
    return tensors, (_geometry(tensors[-2], *window), norm, eps)  # weight and bias are the last two


def _transformed():
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _differentiable(op, setup, backward, jvp):
    """Autograd kernel of an operator.

    torch.library.register_autograd would do, but for torch.func and forward mode, which it has not (pytorch
    issue 168393; when that is closed, this can go). The dispatcher brings every level of every transform
    here, one at a time, so what a level needs is a node of automatic differentiation of this level alone, as
    torch.func itself makes for functions of the user.
    """

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Node(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(keyset, *args):
            if not _transformed():
                return below(keyset, *args)
            # A node computes without gradients; the levels below this one decide for themselves.
            with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return below(keyset, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx, *grads):
            found = backward(ctx, *grads) or ()
            return None, *found, *(None,) * (count - len(found))

        @staticmethod
        def jvp(ctx, keyset, *tangents):
            # off here, which the levels below would take for theirs
            with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return jvp(ctx, *tangents)

    count = len(op._schema.arguments)
    Node.__name__ = Node.__qualname__ = f"coda_fast_{op._opname}"

    def run(keyset, *args):
        transformed, forward_mode = _transformed(), torch.autograd.forward_ad._current_level >= 0
        if not (
            transformed or forward_mode or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        ):
            return below(keyset, *args)
        with (
            torch._functorch.utils.enable_single_level_autograd_function()
            if transformed
            else contextlib.nullcontext()
        ):
            return Node.apply(keyset, *args)

    return run


# -- vmap: several upstream gradients of one input (``is_grads_batched``), for explanations of several classes
# at once -----------------


def _vmap_align_backward(info, in_dims, *args):
    (
        grad,
        input,
        applied,
        *layer,
        dot,
        square,
        contraction,
        prepared,
        stride,
        padding,
        dilation,
        norm,
        eps,
        detach,
        needs,
        backend,
    ) = args
    alone = isinstance(in_dims[0], int) and all(dim is None for dim in in_dims[1:10])
    tensors = [t for t in args[:10] if t is not None]
    levels = len(torch._C._functorch.get_interpreter_stack() or ())  # of transforms, this vmap being the last
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    watched = levels > 1 or tracked or torch.autograd.forward_ad._current_level >= 0
    if alone and detach and not watched:  # nobody differentiates what the backend does
        module = _backend(backend)
        if hasattr(module, "adjoints"):
            like = input if applied is None else applied
            geometry = _geometry(layer[1], stride, padding, dilation)
            with torch.no_grad(), without_autocast(grad.device.type):
                known = square if square.dim() > 1 else None
                found = module.adjoints(
                    input, grad.movedim(in_dims[0], 0), *layer, geometry, norm, eps, like, known
                )
            results = [input.new_empty(info.batch_size, 0) for _ in range(5)]
            results[0 if applied is None else 1] = found
            return tuple(results), (0,) * 5
    return _one_by_one(align_backward, info, in_dims, args)


def _vmap_adjoint(info, in_dims, *args):
    return _one_by_one(adjoint, info, in_dims, args)


def _vmap_align(info, in_dims, *args):
    return _one_by_one(align, info, in_dims, args)


def _one_by_one(op, info, in_dims, args):
    """The operator for every entry of the batch."""
    entry = lambda i: (
        arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)
    )
    each = [op(*entry(i)) for i in range(info.batch_size)]
    if isinstance(each[0], torch.Tensor):
        return torch.stack(each), 0
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])


# -- autocast, and all of it together
# ---------------------------------------------------------------------------------------------------


def _autocast(op, kind):
    def run(*args):
        with torch.autocast(kind, enabled=False):
            return op(*cast_as_convolution(kind, args))

    # the dispatch key is above autograd, so the casts are differentiated as they are for a convolution
    return run


KERNELS = {"align": _align_kernel, "align_backward": _align_backward_kernel, "adjoint": _adjoint_kernel}
_DERIVATIVES = {
    "align": (_setup_align, _backward_of_align, _jvp_of_align),
    "align_backward": (_setup_align_backward, _backward_of_align_backward, _jvp_of_align_backward),
    "adjoint": (_setup_adjoint, _backward_of_adjoint, _jvp_of_adjoint),
}
for _op, _name, _fake, _vmap in (
    (align, "align", _align_fake, _vmap_align),
    (align_backward, "align_backward", _align_backward_fake, _vmap_align_backward),
    (adjoint, "adjoint", _adjoint_fake, _vmap_adjoint),
):
    _LIBRARY.impl(_name, KERNELS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"coda_fast::{_name}", _decompositions.announced(_fake), lib=_LIBRARY)
    _LIBRARY.impl(_name, _differentiable(_op, *_DERIVATIVES[_name]), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"coda_fast::{_name}", _vmap, lib=_LIBRARY)
    if _name != "align_backward":
        for _kind, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _LIBRARY.impl(_name, _autocast(_op, _kind), _key)
_flops.register()
_decompositions.register({align: _align_fake, align_backward: _align_backward_fake, adjoint: _adjoint_fake})
