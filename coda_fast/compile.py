"""Compiling the fused kernels of a model before its first step, in parallel, for the GPU of this machine or
another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coda_fast import backends, ops
from coda_fast._modes import explanation_mode
from coda_fast._wrappers import unwrap
from coda_fast.nn import DAUConv2d

if TYPE_CHECKING:
    from coda_kernels.config import Device

PASSES = ("inference", "training", "explanation")


class _Launches(TorchDispatchMode):
    """Sends the operators of the fused backend to its launchers, which record what they would launch."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("coda_fast::")
        if function.namespace == "coda_fast" and name in ops.KERNELS:
            return ops.KERNELS[name](*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def record_launches(
    model: torch.nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None = None,
    passes: Iterable[str] = PASSES,
    device: Device | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, list]:
    """Every kernel launch that the passes of a model make on a GPU: {pass: launches}. They follow from the
    shapes alone; nothing is computed.

    Args:
        model: any module with DAU layers; it is left unchanged.
        input_shape: of a batch of images, (N, C, H, W).
        dtype: of parameters and images, or that of autocast; None: the dtype of the model's first DAU layer.
        passes: some of "inference", "training" (forward and backward, with gradients of the parameters only)
            and "explanation".
        device: ``coda_kernels.config.Device``; None: the GPU of this machine, or an H100 if there is none.
        memory_format: of the images.
    """
    from coda_kernels import compile as compiler

    if unknown := set(passes) - set(PASSES):
        raise ValueError(
            f"passes: expected some of {', '.join(PASSES)}, got {', '.join(map(str, sorted(unknown)))}"
        )
    if len(input_shape) != 4 or not all(isinstance(size, int) and size > 0 for size in input_shape):
        raise ValueError(
            f"input_shape: expected four positive integers (N, C, H, W), got {tuple(input_shape)}"
        )
    model = unwrap(model)
    layers = [module for module in model.modules() if isinstance(module, DAUConv2d)]
    if not layers:
        raise ValueError(
            f"model: expected a module with at least one DAUConv2d, got {type(model).__name__} without any"
        )
    dtype = dtype or layers[0].weight.dtype
    # only the model's shapes, strides and control flow are needed
    shadow = copy.deepcopy(model).to("meta", dtype)
    for module in shadow.modules():
        if isinstance(module, DAUConv2d):
            module.backend = "triton"
    found = {}
    for name in passes:
        images = torch.empty(input_shape, dtype=dtype, device="meta").to(memory_format=memory_format)
        with compiler.recording(device or _device()) as found[name], _Launches():
            _run(shadow, images, name)
    return found


def _run(model, images, name):
    if name == "inference":
        model.eval()
        with torch.no_grad():
            model(images)
    elif name == "training":
        model.train()
        model(images).sum().backward()
    else:
        model.eval()
        with explanation_mode(model):
            images.requires_grad_()
            torch.autograd.grad(model(images).sum(), images)


def compile_kernels(
    model: torch.nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    workers: int | None = None,
    passes: Iterable[str] = PASSES,
    arch: int | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Compile every fused kernel that a model will launch, in parallel, into Triton's cache, so that the
    first step begins at once.

    The batch size does not matter. A kernel that is already in the cache costs a few milliseconds.

    Args:
        model, input_shape, dtype, passes, memory_format: as in :func:`record_launches`.
        workers: number of processes; None: one for each processor.
        arch: compute capability as 80, 90 or 100, or AMD's "gfx942"; None: that of the GPU of this machine.
            If it is given, no GPU is needed.
        progress: called with the number of kernels done and the number of all kernels.

    Returns:
        The number of kernels.

    Raises:
        ValueError: the model has no DAU layers, or the shape, a pass or the architecture is invalid.
        BackendUnavailable: Triton is missing, or there is no GPU here and ``arch`` is not given.
        RuntimeError: the compiler refused a kernel.
    """
    if missing := backends._triton_unavailable("cuda"):
        raise backends.BackendUnavailable(f"compile_kernels: {missing}")
    from coda_kernels import compile as compiler
    from coda_kernels import config

    if arch is None and not torch.cuda.is_available():
        raise backends.BackendUnavailable(
            "compile_kernels: torch sees no GPU here; name one with arch, such as 90 for an H100"
        )
    if arch is not None and arch not in config.SHARED_BYTES:
        raise ValueError(f"arch: expected one of {', '.join(map(str, config.SHARED_BYTES))}, got {arch}")
    device = _device() if arch is None else config.Device(arch, 132)
    launches = record_launches(model, input_shape, dtype, passes, device, memory_format)
    return compiler.compile_launches(
        [each for found in launches.values() for each in found], device.arch, workers, progress
    )


def compile_for(
    model: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype, passes: Iterable[str] = PASSES
) -> int:
    """:func:`compile_kernels` for a batch of images on its device, if a layer would use the fused backend
    there; returns the number of kernels. ``dtype`` is the one in which the layers compute; under autocast it
    differs from that of the images.
    """
    layers = [module for module in model.modules() if isinstance(module, DAUConv2d)]
    if not any(backends.choose(layer.backend, images.device, dtype) == "triton" for layer in layers):
        return 0
    last = images.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    return compile_kernels(model, tuple(images.shape), dtype, passes=passes, memory_format=form)


def _device():
    from coda_kernels import config, layer

    return layer.device_of(torch.device("cuda")) if torch.cuda.is_available() else config.Device(90, 132)
