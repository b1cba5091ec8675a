"""Derivatives of the operators of ``coda_fast.ops``, to any order, in reverse and forward mode and under the
transforms of ``torch.func``.

First derivatives are operators themselves. Second derivatives and forward mode use the definition
(``coda_fast.backends.reference``), which materialises w.

Symbols: F(x, u) is the output of ``align``, G(x, v) that of ``adjoint``; B, A and b are the parameters.
"""

from __future__ import annotations

import contextlib

import torch

from coda_fast._autocast import without_autocast
from coda_fast._spec import (
    KEEPS,
    Adjoint,
    Align,
    AlignBackward,
    Gradients,
    Kept,
    Parameters,
    flatten,
    rebuild,
)
from coda_fast.backends import reference


def _align(*fields):
    output, *kept = torch.ops.coda_fast.align.default(*flatten(Align(*fields)))
    return output, Kept(*kept)


def _align_backward(*fields):
    return Gradients(*torch.ops.coda_fast.align_backward.default(*flatten(AlignBackward(*fields))))


def _setup_align(ctx, call: Align, output):
    tensors = call.input, call.applied, *call.parameters
    ctx.save_for_forward(*tensors)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.spec, ctx.detach, ctx.keep, ctx.backend = call.spec, call.detach, call.keep, call.backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_align(ctx, grad, *_):
    x, u, *rest = ctx.saved_tensors
    parameters, kept = Parameters(*rest[:3]), Kept(*rest[3:])
    needs = _needed(Gradients(*ctx.needs_input_grad[1:6]), shared=u is None, detach=ctx.detach)
    if grad is None or not any(needs):
        return ()
    with without_autocast(grad.device.type):
        enough = "norm" if ctx.detach else "products"
        if any(needed and not there for needed, there in zip(KEEPS[enough], KEEPS[ctx.keep], strict=True)):
            with torch.no_grad():
                kept = _align(x, u, parameters, ctx.spec, ctx.detach, enough, ctx.backend)[1]
        found = _align_backward(grad, x, u, parameters, kept, ctx.spec, ctx.detach, needs, ctx.backend)
    return _where(needs, found)


def _jvp_of_align(ctx, tangents):
    """In explanation mode w counts as a constant in forward mode too: F(x, u')."""
    tensors = _primals(ctx)
    if ctx.detach:
        x, u, *parameters = tensors
        direction = tangents[0] if u is None else tangents[1]
        direction = torch.zeros_like(x) if direction is None else direction
        parameters = Parameters(*parameters)
        found = _align(x, direction, parameters, ctx.spec, False, "nothing", ctx.backend)[0]
    else:
        found = _align_jvp(tensors, tangents[:5], ctx.spec)
    return found, *(None for _ in Kept._fields)


def _align_jvp(tensors, tangents, spec):
    (x, u, *parameters), (of_x, of_u, *of_parameters) = tensors, tangents
    u, of_u = (x, of_x) if u is None else (u, of_u)
    return reference.align_jvp((x, u, *parameters), (of_x, of_u, *of_parameters), spec)


def _needed(needs: Gradients, *, shared, detach) -> Gradients:
    """Which gradients of ``align`` are needed: in explanation mode only that in u, or in x without a u."""
    direct, *of_parameters = needs.applied, *needs[2:]
    return Gradients(
        needs.input and (shared or not detach), direct, *(need and not detach for need in of_parameters)
    )


def _where(needs, found):
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _setup_align_backward(ctx, call: AlignBackward, output):
    tensors = call.grad, call.input, call.applied, *call.parameters
    ctx.save_for_forward(*tensors)
    ctx.save_for_backward(*tensors)
    ctx.spec, ctx.detach, ctx.needs, ctx.backend = call.spec, call.detach, call.needs, call.backend
    ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
    ctx.set_materialize_grads(False)


def _backward_of_align_backward(ctx, *upstream):
    grad, *tensors = ctx.saved_tensors
    upstream = _where(ctx.needs, upstream)
    need_grad, *needs = ctx.needs_input_grad[1:7]
    if all(h is None for h in upstream):
        return ()
    with without_autocast(grad.device.type):
        if not ctx.detach:
            return _second_derivatives(grad, tensors, upstream, (need_grad, *needs), ctx.spec)
        # the direct term is G(x, grad), whatever u is
        x, u, *parameters = tensors
        h = upstream[0] if u is None else upstream[1]
        adjoint = Adjoint(x, grad, Parameters(*parameters), ctx.spec, ctx.backend)
        dx, dgrad, *others = _adjoint_derivatives(h, adjoint, (needs[0], need_grad, *needs[2:]))
        return dgrad, dx, None, *others


def _setup_adjoint(ctx, call: Adjoint, output):
    tensors = call.input, call.value, *call.parameters
    ctx.save_for_forward(*tensors)
    ctx.save_for_backward(*tensors)
    ctx.spec, ctx.backend = call.spec, call.backend
    ctx.set_materialize_grads(False)


def _backward_of_adjoint(ctx, h):
    input, value, *parameters = ctx.saved_tensors
    if h is None:
        return ()
    adjoint = Adjoint(input, value, Parameters(*parameters), ctx.spec, ctx.backend)
    with without_autocast(h.device.type):
        return _adjoint_derivatives(h, adjoint, ctx.needs_input_grad[1:6])


def _adjoint_derivatives(h, call: Adjoint, needs):
    """(dx, dv, dB, dA, db) of <h, G(x, v)> = <v, F(x, h)>: dv is F itself, the rest is the backward of F
    without its direct term.
    """
    x, value, parameters, spec, backend = call
    others = Gradients(needs[0], False, *needs[2:])
    dv, kept = _align(x, h, parameters, spec, False, "products" if any(others) else "nothing", backend)
    found = Gradients()
    if any(others):
        found = _align_backward(value, x, h, parameters, kept, spec, False, others, backend)
    return _where(needs, found._replace(applied=dv))


def _second_derivatives(grad, tensors, upstream, needs, spec):
    """Gradients of <upstream, gradients of L> in (v, x, u, B, A, b), L = <v, F(x, u)>, by the definition,
    which materialises w.

    Second derivatives commute, so the gradients in x, u, B, A and b are the directional derivative of the
    gradients of L along ``upstream``; the gradient in v is the directional derivative of F.
    """
    of_grad = _align_jvp(tensors, upstream, spec) if needs[0] else None
    found = Gradients()
    if any(needs[1:]):
        found = reference.gradients_jvp((grad, *tensors), (None, *upstream), spec)
    return _where(needs, (of_grad, *found))


def _jvp_of_align_backward(ctx, tangents):
    grad, *tensors = _primals(ctx)
    of_grad, *of_tensors = tangents[:6]
    if not ctx.detach:
        return tuple(
            _where(ctx.needs, reference.gradients_jvp((grad, *tensors), (of_grad, *of_tensors), ctx.spec))
        )
    # the direct term is G(x, grad), whatever u is
    (x, u, *parameters), (of_x, _, *of_parameters) = tensors, of_tensors
    found = reference.adjoint_jvp((x, grad, *parameters), (of_x, of_grad, *of_parameters), ctx.spec)
    return tuple(_where(ctx.needs, Gradients(input=found) if u is None else Gradients(applied=found)))


def _jvp_of_adjoint(ctx, tangents):
    return reference.adjoint_jvp(_primals(ctx), tangents[:5], ctx.spec)


def _primals(ctx):
    """The saved tensors without their tangents."""
    strip = lambda t: torch.autograd.forward_ad.unpack_dual(t, level=0).primal
    return [None if t is None else strip(t) for t in ctx.saved_tensors]


def _transformed():
    """Whether a transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def differentiable(op: torch._ops.OpOverload):
    """The Autograd kernel of an operator.

    torch.library.register_autograd would suffice if it supported torch.func and forward mode (pytorch issue
    168393; this function can go when that is closed). The dispatcher calls this kernel once for every level
    of every transform, so each call makes an autograd node of that level alone, as torch.func itself does
    for the user's functions.
    """
    kind, setup, backward, jvp = _DERIVATIVES[op._opname]

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Node(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(keyset, *args):
            if not _transformed():
                return below(keyset, *args)
            # A node runs with gradients disabled; the levels below this one decide for themselves.
            with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return below(keyset, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, rebuild(kind, inputs[1:]), output)

        @staticmethod
        def backward(ctx, *grads):
            found = backward(ctx, *grads)
            return None, *found, *(None,) * (count - len(found))

        @staticmethod
        def jvp(ctx, keyset, *tangents):
            # Forward mode is off here; the levels below would take that setting for their own.
            with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return jvp(ctx, tangents)

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


_DERIVATIVES = {
    "align": (Align, _setup_align, _backward_of_align, _jvp_of_align),
    "align_backward": (
        AlignBackward,
        _setup_align_backward,
        _backward_of_align_backward,
        _jvp_of_align_backward,
    ),
    "adjoint": (Adjoint, _setup_adjoint, _backward_of_adjoint, _jvp_of_adjoint),
}
