"""The DAU layer as fused Triton kernels (package ``coda_kernels``): this module launches them in order.

    align            prepare (packed parameters, norms, padded image, z) -> contracted or generated
    align_backward   prepare_backward (z, padded image, gs, t, Gram matrices) -> grad_z -> fold;
                     parameter_sums -> finish
    adjoint          prepare -> contracted or generated for the norm -> prepare_backward -> fold

In half precision, products of 16-bit operands accumulate in float32; norms, sums and what is kept for the
backward pass are float32. The functions are those of ``coda_fast.backends.Backend``. ``coda_kernels``
explains the symbols.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coda_fast._geometry import format_of
from coda_fast._spec import KEEPS, Gradients, Kept, Parameters, Spec

if TYPE_CHECKING:
    from coda_kernels.layer import Layer
    from coda_kernels.prepare_backward import Factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def align(
    input: torch.Tensor, applied: torch.Tensor | None, parameters: Parameters, spec: Spec, *, keep: str
) -> tuple[torch.Tensor, Kept]:
    """See ``coda_fast.backends.Backend.align``."""
    layer = _layer(input, parameters, spec)
    with layer.on_device():
        output, kept = _forward(layer, input, applied, keep)
    return output, kept._replace(prepared=layer.prepared if KEEPS[keep].prepared else None)


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
    """See ``coda_fast.backends.Backend.align_backward``. It launches only the kernels that are needed."""
    from coda_kernels import fold, grad_z, prepare, prepare_backward

    x, shared = input.detach(), applied is None
    u = x if applied is None else applied.detach()
    if not kept.square.numel():  # an empty batch
        tensors = (x, None if shared else u, *parameters)
        return Gradients(
            *(
                torch.zeros_like(t) if need and t is not None else None
                for t, need in zip(tensors, needs, strict=True)
            )
        )
    layer = _layer(input, parameters, spec, kept.prepared)
    need_parameters = Parameters(*((False,) * 3 if detach else needs[2:]))
    need_z = (needs.input or need_parameters.reduction_weight) and not detach
    full = need_z or any(need_parameters)
    ranks = layer.shape.R if need_z else 0
    direct_rows = layer.rows[layer.shape.R :]  # the rows of b
    found = Gradients()
    with layer.on_device():
        if kept.prepared is None:
            prepare.run(layer, x=x, u=x, padded=x, paddings=0, parameters=True)
        dot = kept.dot if full else None
        f = prepare_backward.run(
            layer, x=x, u=u, grad=grad, dot=dot, square=kept.square, ranks=ranks, full=full
        )
        if need_z:
            grad_z.run(layer, factors=f, pixels=kept.square.shape[1], contraction=kept.contraction)
        send = lambda image, **options: fold.run(layer, like=image, memory_format=format_of(image), **options)
        if shared and needs.input:
            rows = layer.rows if need_z else direct_rows
            found = found._replace(input=send(input, z=f.z, gs=f.gs, e=f.e, rows=rows))
        if not shared and needs.applied:
            applied_gradient = send(applied, z=f.z, gs=f.gs, e=f.e[:, ranks:], rows=direct_rows)
            found = found._replace(applied=applied_gradient)
        if not shared and needs.input and need_z:
            through_z = send(input, z=None, gs=None, e=f.e[:, :ranks], rows=layer.reduce)
            found = found._replace(input=through_z)
        if any(need_parameters):
            of_parameters = _parameter_gradients(layer, x, shared, f, ranks, need_parameters)
            found = found._replace(**of_parameters._asdict())
    return found


def adjoint(input: torch.Tensor, value: torch.Tensor, parameters: Parameters, spec: Spec) -> torch.Tensor:
    """See ``coda_fast.backends.Backend.adjoint``."""
    if not value.numel():
        return torch.zeros_like(input)
    layer = _layer(input, parameters, spec)
    with layer.on_device():
        square = _forward(layer, input, None, "norm", norm_only=True)[1].square
    return align_backward(
        value,
        input,
        None,
        parameters,
        Kept(square=square, prepared=layer.prepared),
        spec,
        detach=True,
        needs=Gradients(input=True),
    ).input


def adjoints(
    values: torch.Tensor,
    input: torch.Tensor,
    applied: torch.Tensor | None,
    parameters: Parameters,
    kept: Kept,
    spec: Spec,
) -> torch.Tensor:
    """See ``coda_fast.backends.Backend.adjoints``."""
    if kept.square is None:
        kept = align(input, applied, parameters, spec, keep="norm")[1]
    place = "input" if applied is None else "applied"
    one = lambda value: align_backward(
        value, input, applied, parameters, kept, spec, detach=True, needs=Gradients(**{place: True})
    )
    return torch.stack([getattr(one(value), place) for value in values])


def kept_shapes(input: torch.Tensor, parameters: Parameters, spec: Spec, *, keep: str) -> Kept:
    """See ``coda_fast.backends.Backend.kept_shapes``."""
    from coda_kernels.config import Shape

    weight, geometry = parameters.weight, spec.geometry
    units, rank, channels = weight.shape[:3]
    bits = 8 * weight.element_size()
    shape = Shape(channels, units, rank, geometry.kernel, bias=parameters.bias is not None, bits=bits)
    height, width = geometry.output_size(*input.shape[2:])
    pixels, wanted = input.shape[0] * height * width, KEEPS[keep]
    return Kept(
        dot=(units, pixels) if wanted.dot else (0,),
        square=(units, pixels) if wanted.square else (0,),
        contraction=(pixels, units * shape.R) if wanted.contraction and not shape.generated else (0,),
        prepared=(shape.prepared,) if wanted.prepared else (0,),
    )


def gradients_like(parameters: Parameters) -> Parameters:
    """See ``coda_fast.backends.Backend.gradients_like``."""
    from coda_kernels import layer

    return Parameters(*layer.gradients_like(*parameters))


def _layer(input, parameters, spec, prepared=None) -> Layer:
    from coda_kernels.layer import Layer

    if input.dtype not in DTYPES:
        raise TypeError(f'backend="triton": expected float32, bfloat16 or float16, got {input.dtype}')
    return Layer(
        tuple(input.shape[2:]),
        *parameters,
        geometry=spec.geometry,
        norm=spec.norm,
        eps=spec.eps,
        prepared=prepared,
    )


def _forward(layer: Layer, input, applied, keep, norm_only=False):
    """F(x, u), and what ``keep`` requests; with ``norm_only``, only |w|^2 is computed."""
    from coda_kernels import contracted, generated, prepare
    from coda_kernels.layer import as_image

    s, pixels, device, wanted = layer.shape, layer.pixels(input), layer.torch_device, KEEPS[keep]
    output = torch.empty(len(input), *layer.out, s.units, dtype=layer.dtype, device=device)
    kept = Kept(
        dot=torch.empty(s.units, pixels, device=device) if wanted.dot else None,
        square=torch.empty(s.units, pixels, device=device) if wanted.square else None,
        contraction=torch.empty(pixels, s.units * s.R, dtype=layer.dtype, device=device)
        if wanted.contraction and not s.generated  # the generated form has no contraction
        else None,
    )
    if pixels:
        x, u = input.detach(), (input if applied is None else applied).detach()
        padded, paddings = layer.padded_image(u)
        prepared = prepare.run(
            layer,
            x=x,
            u=u,
            padded=padded,
            paddings=paddings,
            reduced=True,
            lengths=applied is None,
            parameters=True,
        )
        if applied is not None:
            of_u = prepare.run(layer, x=u, u=u, padded=padded, paddings=0, lengths=True)
            prepared = prepared._replace(beta=of_u.beta, length=of_u.length)
        made = dict(padded=padded, prepared=prepared, output=output, dot=kept.dot, square=kept.square)
        if s.generated:
            generated.run(layer, **made)
        else:
            contracted.run(layer, **made, contraction=kept.contraction, norm_only=norm_only)
    return as_image(output, format_of(input)), kept


def _parameter_gradients(layer: Layer, x, shared, f: Factors, ranks, needs) -> Parameters:
    """(dB, dA, db), None where not needed; the first ``ranks`` columns of ``f.e`` are dz."""
    from coda_kernels import finish, parameter_sums, prepare

    s = layer.shape
    need_reduce, need_weight, need_bias = needs.reduction_weight, needs.weight, needs.bias and s.bias
    like = gradients_like(Parameters(*layer.parameters))
    found = Parameters(
        *(g if need else None for g, need in zip(like, (need_reduce, need_weight, need_bias), strict=True))
    )
    sums = reduce = None
    if need_weight or need_bias:
        # if u is x, dz and gs multiply the same windows, in one product
        together = need_reduce and shared
        first, last = 0 if together else ranks, ranks + s.units if need_bias else ranks
        sums = parameter_sums.run(
            layer,
            padded=f.padded,
            starts=f.starts,
            z=f.z,
            gs=f.gs,
            t=f.t,
            e=f.e[:, first:last],
            weight=need_weight,
            totals=s.bias,
        )
        if together:
            reduce, sums = sums.direct[:, :ranks], sums._replace(direct=sums.direct[:, ranks:])
    if need_reduce and reduce is None:
        padded = f.padded
        if not shared:
            padded, paddings = layer.padded_image(x)
            if paddings:
                prepare.run(layer, x=x, u=x, padded=padded, paddings=paddings)
        reduce = parameter_sums.run(
            layer,
            padded=padded,
            starts=f.starts,
            z=f.z,
            gs=None,
            t=None,
            e=f.e[:, :ranks],
            weight=False,
            totals=False,
        ).direct
    finish.run(
        layer,
        sums=sums,
        reduce=reduce,
        d_reduce=found.reduction_weight,
        d_weight=found.weight,
        d_bias=found.bias,
    )
    return found
