"""FLOP formulas of the operators in ops.py, for ``torch.utils.flop_counter``: the multiply-adds of the
mathematics, two FLOPs each.

With P output pixels, n units, rank r and d numbers in a patch: contraction 2 P n r d, z = B x and its two
derivatives 2 P r d each, norm 2 P n r min(r, d). A backend may do more (recompute) or less; the count does
not depend on it.
"""

from __future__ import annotations

import math
import sys

import torch

from coda_fast._spec import Adjoint, Align, AlignBackward, rebuild

_COUNTER = "torch.utils.flop_counter"


def _parts(call):
    """(contraction, z, norm), from shapes."""
    n, r, *window = call.parameters.weight.shape
    batch, _, *size = call.input.shape
    pixels, d = batch * math.prod(call.spec.geometry.output_size(*size)), math.prod(window)
    return 2 * pixels * n * r * d, 2 * pixels * r * d, 2 * pixels * n * r * min(r, d)


def _align(call: Align) -> int:
    return sum(_parts(call))


def _align_backward(call: AlignBackward) -> int:
    main, reduce, gram = _parts(call)
    if call.detach:  # the direct term, with the norms of forward
        return main + reduce
    needs = call.needs
    direct = main * (needs.input if call.applied is None else needs.applied)
    dz = (main + gram) * (needs.input or needs.reduction_weight)
    of_reduce = reduce * (needs.input + needs.reduction_weight)
    generate = (main + gram) * (needs.weight or needs.bias)
    return direct + dz + of_reduce + generate + reduce


_FORMULAS = {
    "align": (Align, _align),
    "align_backward": (AlignBackward, _align_backward),
    "adjoint": (Adjoint, _align),
}


def register_if_counting() -> None:
    """Register the formulas with ``FlopCounterMode`` if its module is already imported. Importing it loads
    Triton (76 MiB), which calling a layer must not do.

    A counter copies the registered formulas when it is made, so counters that are active now get ours, too.
    """
    if torch.compiler.is_compiling() or (counter := sys.modules.get(_COUNTER)) is None:
        return
    registry = getattr(counter, "flop_registry", None)  # None: another thread is importing it
    if registry is None or torch.ops.coda_fast.align in registry:
        return
    ours = {getattr(torch.ops.coda_fast, name): _on_call(*formula) for name, formula in _FORMULAS.items()}
    registry.update(ours)
    # torch has no public way to find the counters that are counting
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry.update(ours)


def _on_call(kind, formula):
    return lambda *args, out_val=None: formula(rebuild(kind, args))
