"""The geometry of a sliding window, shared by every backend: kernel, stride, dilation and explicit
padding.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A window of ``kernel`` taps that slides over a padded image; every pair is (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom: the order of torch.nn.functional.pad

    @classmethod
    def make(cls, kernel, stride=1, padding=0, dilation=1) -> Geometry:
        """Build from the arguments of a convolution; ``padding`` may be "same" or "valid". Raises
        ValueError, TypeError.
        """
        kernel, stride, dilation = (
            pair(kernel, "kernel_size"),
            pair(stride, "stride"),
            pair(dilation, "dilation"),
        )
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(
                    f'padding: expected "same", "valid", an int or a pair of ints, got {padding!r}'
                )
            if padding == "same" and stride != (1, 1):
                raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
            total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
            top, left = (t // 2 for t in total)
            return cls(kernel, stride, dilation, (left, total[1] - left, top, total[0] - top))
        vertical, horizontal = pair(padding, "padding", least=0)
        return cls(kernel, stride, dilation, (horizontal, horizontal, vertical, vertical))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an image of ``height x width``; ValueError if the kernel does
        not fit.
        """
        left, right, top, bottom = self.padding
        padded = (height + top + bottom, width + left + right)
        extent = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        if padded[0] < extent[0] or padded[1] < extent[1]:
            raise ValueError(
                f"the kernel does not fit: kernel {self.kernel} with dilation {self.dilation} covers "
                f"{tuple(extent)} pixels, "
                f"the padded input has {padded}"
            )
        return (padded[0] - extent[0]) // self.stride[0] + 1, (padded[1] - extent[1]) // self.stride[1] + 1


def pair(value: int | Sequence[int], name: str, least: int = 1) -> tuple[int, int]:
    """``value`` or ``(value, value)`` as two ints of at least ``least``."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    values = values * 2 if len(values) == 1 else values
    try:
        values = tuple(integer(v) for v in values)
    except TypeError:
        values = ()
    if len(values) != 2:
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return values


def integer(value) -> int:
    """``value`` as an int; NumPy integers are accepted, floats and bools are a TypeError."""
    if isinstance(value, bool):
        raise TypeError("expected an int, got a bool")
    return operator.index(value)


def format_of(image: torch.Tensor) -> torch.memory_format:
    """The memory format of a convolution's output: channels_last if ``image`` is, contiguous otherwise."""
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
