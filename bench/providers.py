"""The providers: coda_fast, its peers and the yardsticks, all through ``setup(provider, case, mode, dtype,
device) -> (inputs, function)`` with the same inputs.

``inputs`` is a list of several sets, to be used in rotation. ``function(*inputs[i])`` does the work once and
returns its results: [y] forward, [y, gradients of x, B, A, b] with backward, [y, gradient of x] for an
explanation; [logits] and so on for networks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch

from bench import layers, networks
from bench.cases import EVERY_CLASS, EXPLANATION, FORWARD, INFERENCE, STEP, Layer, Network
from bench.peers import ALGEBRAIC, CHECKPOINTED, COMPILED, MATERIALISING, PEERS, materialising
from bench.yardsticks import YARDSTICKS, Missing
from coda_fast.functional import dau_conv2d

__all__ = ["ALGEBRAIC", "CHECKPOINTED", "COMPILED", "MATERIALISING", "PEERS", "YARDSTICKS", "Missing"]

CODA = "coda_fast"
KEPT, FACTORED, PRODUCT, COPY = "coda_fast save_contraction", "coda_fast factored", "matrix product", "copy"
TRUE_IMAGES = 2  # images of a network's batch that are also computed in float64


def coda_fast(x, B, A, b, stride=1, padding=0, detach=False, **options):
    """The library with the arguments of the peers: the fused kernels on a GPU, and the choice of "auto"
    elsewhere.
    """
    options.setdefault("backend", "triton" if x.is_cuda else "auto")
    return dau_conv2d(x, B, A, b, stride, padding, detach=detach, **options)


def _kept(*arguments):
    return coda_fast(*arguments, save_contraction=True)


def _factored(*arguments):
    return coda_fast(*arguments, backend="factored")


OURS = {CODA: coda_fast, KEPT: _kept, FACTORED: _factored}


def names(case: Layer | Network, mode: str, device: torch.device, compiled: Sequence[str] = ()) -> list[str]:
    """The providers of a case, in the order of the tables. ``compiled``: which of them are also measured
    through torch.compile.
    """
    gpu, backward = device.type == "cuda", mode not in (FORWARD, INFERENCE)
    found = [peer.name for peer in PEERS.values() if _is_measured(peer, case, mode, gpu)]
    if isinstance(case, Layer) and case.axis:
        return [*(name for name in found if PEERS[name].style), CODA]
    found += [name + COMPILED for name in (*found, CODA) if name in compiled]
    found.insert(found.index(CODA + COMPILED) if CODA + COMPILED in found else len(found), CODA)
    if gpu:
        kept = backward and mode not in (EXPLANATION, EVERY_CLASS)
        # otherwise nothing is kept (docs of dau_conv2d), and it would be coda_fast under another name
        if isinstance(case, Layer):
            kept = kept and case.rank <= 64 < case.depth
        found += [KEPT] * kept + [FACTORED]
    if isinstance(case, Layer):
        return [*found, PRODUCT]
    large = not gpu and case.batch > 16
    return found + [y.name for y in YARDSTICKS.values() if mode in y.modes and not (y.slow and large)]


def _is_measured(peer, case, mode, gpu):
    backward, network = mode not in (FORWARD, INFERENCE), isinstance(case, Network)
    if gpu:
        return backward or not peer.recomputes
    if peer.slow and network and (case.batch > 16 or not (case.every_peer or mode == STEP)):
        return False  # a call takes seconds, and tens of seconds at batch 64
    if peer.recomputes:  # never the fastest on a CPU; one mode shows the cost of recomputing
        return network and mode == STEP and case.batch <= 16 and case.every_peer
    return True


def compared() -> list[str]:
    """The providers over which speed-ups of coda_fast are given."""
    return [*PEERS, *(name + COMPILED for name in PEERS), FACTORED, *YARDSTICKS]


def setup(
    provider: str, case: Layer | Network, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[list, Callable]:
    """The inputs and the function of a provider. Raises ``Missing`` if it cannot run."""
    if provider == PRODUCT:
        return layers.product(case, mode, dtype, device)
    base = provider.removesuffix(COMPILED)
    if base in YARDSTICKS:
        return YARDSTICKS[base].setup(case, mode, dtype, device)
    layer = OURS[base] if base in OURS else PEERS[base].layer
    compile = (lambda function: compiled(function, device)) if provider != base else lambda function: function
    if isinstance(case, Layer):
        return layers.setup(compile(layer), case, mode, dtype, device)
    # the peers propagate classes back one after the other
    return networks.setup(layer, case, mode, dtype, device, compile, batched=base in OURS)


def truth(case: Layer | Network, mode: str, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """The results of the materialising formula in float64 for the first inputs, or for the first TRUE_IMAGES
    images of a network.
    """
    if isinstance(case, Layer):
        return layers.layer_truth(case, mode, layers.layer_inputs(case, dtype, device)[0])
    few = dataclasses.replace(case, batch=min(TRUE_IMAGES, case.batch))
    _, function = networks.setup(materialising, few, mode, torch.float64, device)
    inputs, _ = networks.setup(materialising, case, mode, dtype, device)
    images, labels = (t[: few.batch] for t in inputs[0])
    return [t.detach() for t in function(images.double(), labels)]


def compiled(function: Callable, device: torch.device) -> Callable:
    """``torch.compile``. On a GPU it uses mode="max-autotune" with CUDA graphs; on a CPU that mode would
    spend a few seconds on tuning each of two small products. CODA_FAST_BENCH_ATEN=1 limits the choice to
    products and convolutions of libraries, to compile sooner: PyTorch's own profiling found no gain from
    Inductor's convolutions on an H100 (comment in torch._inductor.config).
    """
    if os.environ.get("CODA_FAST_BENCH_ATEN"):
        from torch._inductor import config

        config.max_autotune_gemm_backends = config.max_autotune_conv_backends = "ATEN"
    mode = "max-autotune" if device.type == "cuda" else "default"
    faster = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)

    def run(*arguments):
        torch.compiler.cudagraph_mark_step_begin()
        return faster(*arguments)

    return run


def forget_compiled() -> None:
    """Free the memory of torch.compile: guards, code, pools of CUDA graphs."""
    torch._dynamo.reset()
