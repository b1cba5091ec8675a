"""One ``setup(case, mode, dtype, device) -> (inputs, function)`` for each provider, all with the same inputs.

``inputs`` is a list of several sets, to be rotated; ``function(*inputs[i])`` does the work once and returns
its results: [y] forward, [y, gradients of x, B, A, b] with backward, [y, gradient of x] for an explanation;
[logits] and so on for networks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bench import peers
from bench.cases import EVERY_CLASS, EXPLANATION, FORWARD, INFERENCE, PRODUCTS, STEP, Layer, Network
from coda_fast import DAUConv2d, create_model
from coda_fast.functional import dau_conv2d

MATERIALISING, ALGEBRAIC, CHECKPOINTED, CODA = (
    "materialising",
    "algebraic",
    "algebraic checkpointed",
    "coda_fast",
)
KEPT, FACTORED, PRODUCT, COPY = "coda_fast save_contraction", "coda_fast factored", "matrix product", "copy"
RESNET, BCOS, GRADIENT = "ResNet-50", "B-cos ResNet-50", "InputXGradient of ResNet-18"
YARDSTICKS = (RESNET, BCOS, GRADIENT)
COMPILED = " compiled"
PEERS = {MATERIALISING: peers.materialising, ALGEBRAIC: peers.algebraic, CHECKPOINTED: peers.checkpointed}


TRUE_IMAGES = 2  # of a network's batch that are computed in float64 too


class Missing(RuntimeError):
    """A provider that cannot run here; the message says why."""


def coda_fast(x, B, A, b, stride=1, padding=0, detach=False, **options):
    """The library with the arguments of the peers: the fused kernels on a GPU, what "auto" picks
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
    """The providers of a case, in the order of the tables; ``compiled``: which of them also through
    torch.compile.
    """
    gpu, explaining = device.type == "cuda", mode in (EXPLANATION, EVERY_CLASS)
    backward = mode not in (FORWARD, INFERENCE)
    kept = backward and not explaining
    # else there is nothing to keep (docs of dau_conv2d), and it would be coda_fast by another name
    if isinstance(case, Layer):
        kept = kept and case.rank <= 64 < case.depth
    found = [MATERIALISING, ALGEBRAIC]
    if isinstance(case, Network) and not gpu and (case.batch > 16 or not (case.every_peer or mode == STEP)):
        found.remove(MATERIALISING)  # which takes seconds a call, at batch 64 tens of them
    # on a CPU it is never the fastest, and says what recomputing costs once, for the network
    once = isinstance(case, Network) and mode == STEP and case.batch <= 16 and case.every_peer
    found += [CHECKPOINTED] if backward and (gpu or once) else []
    if isinstance(case, Layer) and case.axis:
        return [*found[:2], CODA]
    found += [name + COMPILED for name in (*found, CODA) if name in compiled]
    found.insert(found.index(CODA + COMPILED) if CODA + COMPILED in found else len(found), CODA)
    if gpu:
        found += [KEPT] if kept else []
        found += [FACTORED]
    if isinstance(case, Layer):
        return [*found, PRODUCT]
    beside = mode != EVERY_CLASS and (gpu or case.batch <= 16)
    return [*found, *([RESNET, BCOS] if beside else []), *([GRADIENT] if mode == EXPLANATION else [])]


def setup(
    provider: str, case: Layer | Network, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[list, Callable]:
    """The inputs and the function of a provider. ``Missing`` where it cannot run."""
    if provider == PRODUCT:
        return _product(case, mode, dtype, device)
    base = provider.removesuffix(COMPILED)
    if isinstance(case, Layer):
        return _layer({**PEERS, **OURS}[base], provider != base, case, mode, dtype, device)
    if base in YARDSTICKS:
        return _yardstick(base, case, mode, dtype, device)
    return _network({**PEERS, **OURS}[base], provider != base, case, mode, dtype, device)


# -- layers
# ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # the same tensors for all providers of a case, made once
def layer_inputs(case: Layer, dtype: torch.dtype, device: torch.device) -> list[tuple]:
    """Sets of (x, B, A, b, upstream gradient) that share their parameters: as many as it takes to leave the
    cache, 2 at least. Images are channels last on a GPU (what cuDNN wants), as torch makes them on a CPU
    (where that is faster for every peer).
    """
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    module = DAUConv2d(case.channels, case.units, case.kernel, case.stride, case.padding, rank=case.rank)
    # Parameters, not plain tensors: those would be copied into a CUDA graph at each call, which no network
    # does with its weights
    parameters = [
        torch.nn.Parameter(p.detach().to(device, dtype))
        for p in (module.reduction_weight, module.weight, module.bias)
    ]
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    side = math.isqrt(case.pixels // case.batch)
    shapes = ((case.batch, case.channels, case.size, case.size), (case.batch, case.units, side, side))
    sets = []
    for _ in range(rotation(math.prod(shapes[0]) * dtype.itemsize, device)):
        made = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
        x, upstream = (t.contiguous(memory_format=layout) for t in made)
        sets.append((x.requires_grad_(), *parameters, upstream))
    return sets


def rotation(nbytes: int, device: torch.device) -> int:
    """How many inputs of this size exceed twice the L2 cache of a GPU; from 2 to 64."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, -(-2 * cache // max(1, nbytes))))


def _layer(layer, compile, case, mode, dtype, device):
    layer = _compiled(layer, device) if compile else layer
    geometry = (case.stride, case.padding)

    def forward(x, B, A, b, upstream):
        with torch.no_grad():
            return [layer(x, B, A, b, *geometry)]

    def training(x, B, A, b, upstream):
        y = layer(x, B, A, b, *geometry)
        return [y, *torch.autograd.grad(y, [x, B, A, b], upstream)]

    def explanation(x, B, A, b, upstream):
        y = layer(x, B, A, b, *geometry, True)
        return [y, *torch.autograd.grad(y, [x], upstream)]

    inputs = layer_inputs(case, dtype, device)
    # nobody asks for gradients of parameters, and a compiled backward would compute them all the same
    if mode == EXPLANATION:
        frozen = [torch.nn.Parameter(p.detach(), requires_grad=False) for p in inputs[0][1:4]]
        inputs = [(x, *frozen, upstream) for x, _, _, _, upstream in inputs]
    return inputs, forward if mode == FORWARD else explanation if mode == EXPLANATION else training


def truth(case: Layer | Network, mode: str, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """The results of the materialising formula in float64 for the first inputs; of a network for its first
    TRUE_IMAGES images.
    """
    if isinstance(case, Layer):
        return layer_truth(case, mode, layer_inputs(case, dtype, device)[0])
    few = dataclasses.replace(case, batch=min(TRUE_IMAGES, case.batch))
    _, function = _network(peers.materialising, False, few, mode, torch.float64, device)
    inputs, _ = _network(peers.materialising, False, case, mode, dtype, device)
    images, labels = (t[: few.batch] for t in inputs[0])
    return [t.detach() for t in function(images.double(), labels)]


def layer_truth(case: Layer, mode: str, inputs: tuple, limit: int = 1 << 30) -> list[torch.Tensor]:
    """For these inputs, computed for a few images at a time (w stays below ``limit`` bytes)."""
    tensors = [t.detach().double() for t in inputs]
    limit = 4 * limit if tensors[0].is_cuda else limit
    step = max(1, limit // (8 * case.units * case.depth * (case.pixels // case.batch)))
    _, function = _layer(peers.materialising, False, case, mode, torch.float64, tensors[0].device)
    parts = []
    for start in range(0, case.batch, step):
        x, B, A, b, upstream = tensors
        piece = slice(start, start + step)
        leaves = [t.detach().requires_grad_() for t in (x[piece], B, A, b)]
        parts.append([t.detach() for t in function(*leaves, upstream[piece])])
    # y and dx are by image, gradients of parameters are sums over them
    by_image = len(parts[0]) if len(parts[0]) <= 2 else 2
    return [
        torch.cat(p) if i < by_image else torch.stack(p).sum(0)
        for i, p in enumerate(zip(*parts, strict=True))
    ]


def _product(case, mode, dtype, device):
    """The ceiling: the plain matrix products that the mode cannot do without (PRODUCTS): [P, d] x [d, n r]
    forward, [P, n r] x [n r, d] for dx, [n r, P] x [P, d] for dA. The first writes n r numbers a pixel, which
    a fused layer does not.
    """
    generator = torch.Generator(device).manual_seed(0)
    # libraries are far slower where rows do not begin at a multiple of 16 bytes, which says nothing about
    # what can be reached
    depth = -(-case.depth // 8) * 8 if device.type == "cuda" else case.depth
    wide = case.units * case.rank
    random = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
    inputs = [
        (random(case.pixels, depth),) for _ in range(rotation(case.pixels * depth * dtype.itemsize, device))
    ]
    weights, out, dx, dweights = (
        random(wide, depth),
        random(case.pixels, wide),
        torch.empty_like(inputs[0][0]),
        random(wide, depth),
    )

    def products(x):
        torch.mm(x, weights.t(), out=out)
        if PRODUCTS[mode] > 1:
            torch.mm(out, weights, out=dx)
        if PRODUCTS[mode] > 2:
            torch.mm(out.t(), x, out=dweights)
        return []

    return inputs, products


# -- networks
# ------------------------------------------------------------------------------------------------------------


def _network(layer, compile, case, mode, dtype, device):
    torch.manual_seed(0)
    # without the bias of the logits, beside which what the layers give is rounding of a narrow dtype
    model = create_model(case.name, logit_bias=0.0).to(
        device, torch.float64 if dtype == torch.float64 else torch.float32
    )
    model.requires_grad_(mode == STEP)  # a compiled backward computes what is asked or not

    def logits(images, detach=False):
        x = model.encoder(images)
        # cast once a layer, the same for all: left to autocast, the peers would carry float32 activations
        for m in model.layers:
            tensors = (t.to(dtype) for t in (x, m.reduction_weight, m.weight, m.bias))
            x = layer(*tensors, m.stride, m.padding, detach)
        return model.head(x)

    run = _compiled(logits, device) if compile else logits
    parameters = list(model.parameters())
    batched = layer in OURS.values()  # the peers send classes back one after the other
    return _steps(
        run,
        lambda images: run(images, True),
        parameters,
        model.num_classes,
        case,
        mode,
        torch.float32,
        device,
        batched,
    )


def _yardstick(name, case, mode, dtype, device):
    if name == GRADIENT:
        return _input_times_gradient(case, dtype, device)
    classes = create_model(case.name, device="meta").num_classes
    torch.manual_seed(0)
    model = (_resnet if name == RESNET else _bcos)(classes).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    model.train(mode == STEP).requires_grad_(mode == STEP)
    explaining = (
        model.explanation_mode() if name == BCOS and mode == EXPLANATION else contextlib.nullcontext()
    )
    encode = (lambda x: torch.cat([x, 1 - x], 1)) if name == BCOS else (lambda x: x)

    def logits(images):
        with explaining:
            return model(encode(images))

    return _steps(logits, logits, list(model.parameters()), classes, case, mode, dtype, device)


def _resnet(classes, name="resnet50"):
    try:
        from torchvision import models
    # beside another torch than its own it raises RuntimeError
    except (ImportError, RuntimeError, OSError) as error:
        raise Missing(f"torchvision: {error}") from None
    return models.get_model(name, num_classes=classes)


def _input_times_gradient(case, dtype, device):
    """What explains an ordinary network for the least: captum's InputXGradient of a ResNet-18. For images of
    32 pixels it has the stem that they need to be classified as well as by S-CoDA: 3 x 3 and no pooling.
    """
    try:
        from captum.attr import InputXGradient
    except ImportError as error:
        raise Missing(f"captum: {error}") from None
    classes = create_model(case.name, device="meta").num_classes
    torch.manual_seed(0)
    model = _resnet(classes, "resnet18")
    if case.size <= 64:
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    model = model.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    method = InputXGradient(model)
    inputs, _ = _steps(
        model,
        model,
        [torch.nn.Parameter(torch.empty(0, device=device))],
        classes,
        case,
        INFERENCE,
        dtype,
        device,
    )

    def explanation(images, labels):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return [method.attribute(images.detach().requires_grad_(), target=labels)]

    return inputs, explanation


def _bcos(classes):
    try:
        from bcos.models.resnet import resnet50
    except (ImportError, RuntimeError, OSError) as error:
        raise Missing(f"bcos (pip install 'coda-fast[bench]'): {error}") from None
    return resnet50(num_classes=classes, in_chans=6)


def _steps(logits, explained, parameters, classes, case, mode, dtype, device, batched=False):
    """What a user does with a network: float32 weights, under autocast where ``dtype`` is a narrower one,
    Adam, binary cross-entropy.
    """
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    shape = (case.batch, 3, case.size, case.size)
    inputs = []
    for _ in range(rotation(4 * math.prod(shape), device)):
        images = torch.rand(shape, generator=generator, device=device).contiguous(memory_format=layout)
        inputs.append((images, torch.randint(classes, (case.batch,), generator=generator, device=device)))
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # a rate of zero: every step does its work on the same weights, so that what is timed does not depend on
    # how often
    gpu = device.type == "cuda"
    optimiser = torch.optim.Adam(parameters, lr=0.0, fused=gpu, capturable=gpu)  # in a CUDA graph too
    if mode == STEP:  # its moments belong to what is there before
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def inference(images, labels):
        with torch.no_grad(), autocast():
            return [logits(images)]

    def explanation(images, labels):
        images = images.detach().requires_grad_()
        with autocast():
            outputs = explained(images)
        chosen = outputs.gather(1, labels[:, None]).sum()
        return [outputs, *torch.autograd.grad(chosen, [images])]

    def every_class(images, labels):
        images = images.detach().requires_grad_()
        with autocast():
            outputs = explained(images)
        upstream = (
            torch.eye(classes, device=outputs.device, dtype=outputs.dtype)
            .unsqueeze(1)
            .expand(-1, len(images), -1)
        )
        send_back = lambda one: torch.autograd.grad(outputs, images, one, retain_graph=True)[0]
        return [
            outputs,
            torch.func.vmap(send_back)(upstream)
            if batched
            else torch.stack([send_back(one) for one in upstream]),
        ]

    def step(images, labels):
        with autocast():
            outputs = logits(images)
        loss = F.binary_cross_entropy_with_logits(outputs.float(), F.one_hot(labels, classes).float())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)  # at the end: gradients count as memory of the step
        return [outputs.detach()]

    return inputs, {INFERENCE: inference, EXPLANATION: explanation, EVERY_CLASS: every_class, STEP: step}[
        mode
    ]


# -- torch.compile
# ------------------------------------------------------------------------------------------------------------


def _compiled(function, device):
    """``torch.compile``; on a GPU with mode="max-autotune", CUDA graphs included (on a CPU that mode tunes
    two small products, for a few seconds each). CODA_FAST_BENCH_ATEN=1 leaves it the choice among libraries'
    products and convolutions only, to compile sooner: PyTorch's own profiling found no gain from Inductor's
    convolutions on an H100 (comment in torch._inductor.config).
    """
    if os.environ.get("CODA_FAST_BENCH_ATEN"):
        from torch._inductor import config

        config.max_autotune_gemm_backends = config.max_autotune_conv_backends = "ATEN"
    mode = "max-autotune" if device.type == "cuda" else "default"
    compiled = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)

    def run(*arguments):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments)

    return run


def forget_compiled() -> None:
    """Free what torch.compile holds: guards, code, pools of CUDA graphs."""
    torch._dynamo.reset()


def copy(nbytes: int, device: torch.device) -> tuple[list, Callable]:
    """The other ceiling: a copy of so many bytes within the device."""
    inputs = [
        tuple(torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(2)
    ]
    return inputs, lambda source, target: [target.copy_(source)][:0]
