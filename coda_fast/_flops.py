"""FLOP formulas of the operators in ops.py, for ``torch.utils.flop_counter``: the multiply-adds of the
mathematics, two FLOPs each.

With P output pixels, n units, rank r and d numbers in a patch: contraction 2 P n r d, z = B x and its two
derivatives 2 P r d each, norm 2 P n r min(r, d). A backend may do more (recompute) or less; the count does
not depend on it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys

import torch

from coda_fast._geometry import Geometry

_COUNTER = "torch.utils.flop_counter"


def _parts(input, weight, stride, padding, dilation):
    """(contraction, z, norm), from shapes."""
    n, r, *window = weight
    geometry = Geometry(tuple(window[1:]), tuple(stride), tuple(dilation), tuple(padding))
    pixels, d = input[0] * math.prod(geometry.output_size(*input[2:])), math.prod(window)
    return 2 * pixels * n * r * d, 2 * pixels * r * d, 2 * pixels * n * r * min(r, d)


def _forward(input, applied_or_value, reduction_weight, weight, bias, stride, padding, dilation, *rest, **_):
    return sum(_parts(input, weight, stride, padding, dilation))


def _backward(
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
    *rest,
    **_,
):
    main, reduce, gram = _parts(input, weight, stride, padding, dilation)
    if detach:  # the direct term, with the norms of forward
        return main + reduce
    need_x, need_u, need_reduce, need_weight, need_bias = needs
    direct = main * (need_x if applied is None else need_u)
    dz = (main + gram) * (need_x or need_reduce) + reduce * (need_x + need_reduce)
    generate = (main + gram) * (need_weight or need_bias)
    return direct + dz + generate + reduce


def _register(register_flop_formula) -> None:
    for name, formula in (("align", _forward), ("align_backward", _backward), ("adjoint", _forward)):
        register_flop_formula(getattr(torch.ops.coda_fast, name))(formula)


class _AtImport(importlib.abc.MetaPathFinder):
    """Registers when somebody imports the counter: it loads Triton (76 MiB), which a mere ``import
    coda_fast`` must not.
    """

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register(module.register_flop_formula)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Make the formulas known to ``FlopCounterMode``: now if the counter is loaded, else as soon as it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER].register_flop_formula)
    else:
        sys.meta_path.insert(0, _AtImport())
