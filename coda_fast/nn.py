"""The DAU layer as a module, and the layers without parameters around it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from coda_fast import backends
from coda_fast._geometry import Geometry, integer, pair
from coda_fast._modes import THREAD, ModalLayer, call_stand_in, explanation_mode, refuse_reentrant_checkpoint
from coda_fast.functional import EPS, check_norm, check_save_contraction, dau_conv2d, dau_conv2d_transpose
from coda_fast.safety import need_memory

__all__ = ["AddInverse", "DAUConv2d", "SumPool2d", "explanation_mode"]


class DAUConv2d(ModalLayer):
    r"""A layer of Dynamic Alignment Units, used like ``nn.Conv2d`` (same positional arguments).

    Each unit computes its weight from the patch it is applied to and bounds its norm, so that the output is
    ``W(x) x``; see ``coda_fast.functional.dau_conv2d`` for the equations, ``norm``, ``eps``, ``backend`` and
    ``save_contraction``.

    Args:
        in_channels, out_channels: C and n, the number of units.
        kernel_size, stride, padding, dilation: ints or pairs; padding may be "same" or "valid".
        groups: 1 only.
        bias: whether the generated weight has a constant part ``b``. It is a bias of the *weight*, so the
            layer stays dynamic linear.
        padding_mode: "zeros" only.
        rank: r, the rank of the map from patch to weight; at least 1.

    Shapes: input [N, C, H, W] or [C, H, W]; output [N, n, OH, OW] or [n, OH, OW].
    Parameters: ``reduction_weight`` [r, C, kh, kw], ``weight`` [n, r, C, kh, kw], ``bias`` [n, C, kh, kw] or
    None. Attribute ``explaining``: whether a call made here and now is in ``explanation_mode`` (read-only).

    Raises:
        ValueError, TypeError: at construction, an argument is not supported; the message says why.

    >>> import torch, coda_fast
    >>> layer = coda_fast.DAUConv2d(6, 16, 3, padding=1, rank=32)
    >>> layer(torch.rand(2, 6, 32, 32)).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 32,
        norm: str = "squash",
        eps: float = EPS,
        backend: str = "auto",
        save_contraction: bool | str = "auto",
    ):
        super().__init__()
        if groups != 1:
            raise ValueError(
                f"groups: DAUConv2d supports 1 only (every unit aligns with all input channels), got {groups}"
            )
        if padding_mode != "zeros":
            raise ValueError(
                'padding_mode: DAUConv2d supports "zeros" only (other modes would break the exact '
                "decomposition into pixels), "
                f"got {padding_mode!r}"
            )
        counts = {"in_channels": in_channels, "out_channels": out_channels, "rank": rank}
        for name, value in counts.items():
            try:
                counts[name] = integer(value)
            except TypeError:
                counts[name] = 0
            if counts[name] < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        in_channels, out_channels, rank = counts.values()
        kernel_size = pair(kernel_size, "kernel_size")
        check_size(
            [in_channels * math.prod(kernel_size) * (rank + out_channels * (rank + bool(bias)))],
            device,
            dtype,
        )
        check_norm(norm, eps)
        check_save_contraction(save_contraction)
        backends.check_name(backend)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.kernel_size, self.stride, self.dilation = (
            kernel_size,
            pair(stride, "stride"),
            pair(dilation, "dilation"),
        )
        self.padding = padding if isinstance(padding, str) else pair(padding, "padding", least=0)
        _ = self.geometry  # raises if these do not fit together
        self.groups, self.padding_mode = groups, padding_mode
        self.norm, self.eps, self.backend, self.save_contraction = norm, eps, backend, save_contraction
        window = (in_channels, *self.kernel_size)
        options = {"device": device, "dtype": dtype}
        self.reduction_weight = nn.Parameter(torch.empty(rank, *window, **options))
        self.weight = nn.Parameter(torch.empty(out_channels, rank, *window, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, *window, **options)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Uniform: ``reduction_weight`` within ``1 / sqrt(d)``, ``weight`` and ``bias`` within ``1 /
        sqrt(r)``.

        The fan-in of the weight generation is r, not the r C kh kw that ``nn.init`` infers from the shape of
        ``weight``. With that, ``|w|^2`` would be d times smaller, "squash" would pass about ``|w|^2`` of its
        input, and a deep stack would output nearly nothing at the start of training. Here ``|w|^2`` is about
        ``d mean(x^2) / 9 + d / (3 r)``, and a unit passes on most of the energy along its weight.
        """
        for tensor, fan_in in (
            (self.reduction_weight, self.reduction_weight[0].numel()),
            (self.weight, self.rank),
            (self.bias, self.rank),
        ):
            if tensor is not None:
                nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @property
    def geometry(self) -> Geometry:
        """Kernel, stride, padding and dilation as backends take them."""
        return Geometry.make(self.kernel_size, self.stride, self.padding, self.dilation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] or [in_channels, H, W] -> [N, out_channels, OH, OW]."""
        if not isinstance(input, torch.Tensor) and isinstance(input, torch.fx.Proxy):
            return self._trace(input)
        if THREAD.stand_in is not None:
            return call_stand_in(self, input)
        explaining = self.explaining
        if explaining and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            refuse_reentrant_checkpoint()
        return dau_conv2d(
            input,
            self.reduction_weight,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.norm,
            self.eps,
            explaining,
            self.backend,
            self.save_contraction,
        )

    def adjoint(self, input: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``value`` [N, n, OH, OW] times the transpose of the weights that ``input`` [N, C, H, W] generates:
        [N, C, H, W]. See ``coda_fast.functional.dau_conv2d_transpose``.
        """
        return dau_conv2d_transpose(
            input,
            value,
            self.reduction_weight,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.norm,
            self.eps,
            self.backend,
        )

    def _trace(self, input):
        """Make the layer a leaf of torch.fx.symbolic_trace, as an nn.Conv2d is."""
        names = [name for name, module in input.tracer.root.named_modules() if module is self]
        if not names or not names[0]:
            raise TypeError(
                "torch.fx.symbolic_trace: expected a module with the DAUConv2d in it, got the layer itself, "
                "which is a leaf"
            )
        return input.tracer.create_proxy("call_module", names[0], (input,), {})

    def __prepare_scriptable__(self):
        raise TypeError(
            "torch.jit.script: expected torch.jit.trace, torch.export or torch.compile for a DAUConv2d, "
            "whose code is Python"
        )

    def _apply(self, fn, recurse=True):
        # module.to(memory_format=torch.channels_last) refuses the five dimensions of ``weight``, so ``fn``
        # gets it with four
        def four_dimensional(tensor):
            return (
                fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2]) if tensor.dim() == 5 else fn(tensor)
            )

        return super()._apply(four_dimensional, recurse)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, rank={self.rank}"
        )
        plain = {**(DAUConv2d.__init__.__kwdefaults__ or {}), "padding": (0, 0), "dilation": (1, 1)}
        for name in ("padding", "dilation", "norm", "eps", "backend", "save_contraction"):
            if getattr(self, name) != plain[name]:
                text += f", {name}={getattr(self, name)!r}"
        return text + (", bias=False" if self.bias is None else "")


def check_size(numbers: Iterable[int], device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise a ValueError if the layers' weights, of these ``numbers`` of elements, are too large for a tensor
    or for this machine's memory.
    """
    size = getattr(torch.get_default_dtype() if dtype is None else dtype, "itemsize", 4)
    place = torch.get_default_device() if device is None else torch.device(device)
    numbers = list(numbers)
    if max(numbers) * size >= 2**63:
        raise ValueError(
            "weights: expected less than 2**63 bytes for a layer, got about "
            f"2**{(max(numbers) * size).bit_length() - 1}"
        )
    if place.type != "meta" and sum(numbers) * size > 2**28:  # smaller ones need no check
        need_memory(f"weights of {sum(numbers):.1e} numbers", sum(numbers) * size, place)


class AddInverse(nn.Module):
    """``x -> [x, 1 - x]`` along the channels, [N, C, H, W] -> [N, 2 C, H, W], so that every colour, even
    black, has a direction of its own.

    Images are expected in [0, 1] and unnormalised.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, 2 C, H, W]."""
        return torch.cat((images, 1 - images), -3)


class SplitSigns(nn.Module):
    """``f -> [max(f, 0), max(-f, 0)]`` along the channels, [N, C, H, W] -> [N, 2 C, H, W]: the encoding of
    features, which may have both signs.

    A DAU aligns its weight with its input, and the opposite of an input is the input to which it responds
    least. Without the split it could not respond to a feature and to its opposite independently; with it the
    two have directions of their own, as a colour and its inverse have in ``AddInverse``. A feature that is
    absent is zero in both halves and contributes nothing, whereas ``[f, 1 - f]`` would need features in
    [0, 1] and let absent ones contribute. ``f`` is the difference of the halves, so nothing is lost, and a
    sum of contributions of the halves is an exact sum of contributions of the features.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, 2 C, H, W]."""
        return torch.cat((features.clamp(min=0), (-features).clamp(min=0)), -3)


class SumPool2d(nn.Module):
    """Sum over the pixels, [N, C, H, W] -> [N, C]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C]."""
        return input.sum((-2, -1))
