"""Matrix products of the factored form, and the memory for their results."""

from __future__ import annotations

import functools
import math
import threading

import torch

# Bytes of the largest intermediate of a chunk, for CPUs from docs/benchmark.md, for other devices a guess
CHUNK_BYTES = {"cpu": 2 << 20, "other": 256 << 20}
# The largest buffer, in bytes, that a thread keeps for its next call
SCRATCH_BYTES = 8 << 20
# The largest product, in multiplications, that uses torch.mm
SMALL_PRODUCT = 1 << 22


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``; ``a`` should be contiguous, ``b`` may be a transposed view.

    On a CPU in float32 it uses oneDNN's product, as torch does for compiled linear layers, if this version of
    torch has it. That takes 0.7 to 0.95 times as long as ``torch.mm``, except for small products, for which a
    call costs about 20 us more.
    """
    large = a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() * b.shape[1] > SMALL_PRODUCT
    if large and torch.backends.mkldnn.enabled and _has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


@functools.cache
def _has_onednn_linear() -> bool:
    """Whether the operator exists and multiplies a matrix by a transposed view. torch does not document the
    operator, so this tries it.
    """
    a, b = (torch.arange(n, dtype=torch.float32, device="cpu").view(-1, 3) for n in (6, 12))
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, b.t().contiguous().t(), None, "none", [], "")
        return found.tolist() == [[5, 14, 23, 32], [14, 50, 86, 122]]
    except (AttributeError, RuntimeError, TypeError):
        return False


def chunk_bytes(tensor: torch.Tensor) -> int:
    """The size in bytes allowed for an intermediate on the device of ``tensor``."""
    return CHUNK_BYTES["cpu" if tensor.device.type == "cpu" else "other"]


def units_at_once() -> int:
    """The number of units in a batched product: torch distributes units over threads, and fewer than four
    units at once are slower, whatever the number of threads.
    """
    threads = min(torch.get_num_threads(), 16)
    return threads * -(-4 // threads)


def add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """``total + part``, in place; a ``total`` of None counts as zero."""
    return part if total is None else total.add_(part)


def stacked(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Matrices stacked vertically; None if there are none."""
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None


class Scratch:
    """A buffer for the large intermediates of all chunks, because the first use of new memory costs as much
    as the computation in it. On a CPU, whose allocator may return memory to the system after every call, the
    thread keeps the buffer for its next call. A buffer in use is never shared: a finaliser or signal handler
    that calls a layer in the meantime makes its own.
    """

    kept = threading.local()

    def __init__(self):
        self.buffer = self.kept.__dict__.pop("buffer", None)

    def __del__(self):
        if (
            self.buffer is not None
            and self.buffer.device.type == "cpu"
            and self.buffer.nbytes <= SCRATCH_BYTES
        ):
            self.kept.buffer = self.buffer

    def __call__(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """An uninitialised tensor in the buffer; it overwrites that of the previous call."""
        numbers = math.prod(shape)
        found = self.buffer
        if found is None or len(found) < numbers or found.dtype != like.dtype or found.device != like.device:
            with torch.inference_mode(False):  # the buffer outlives the mode
                self.buffer = torch.empty(numbers, dtype=like.dtype, device=like.device)
        return self.buffer[:numbers].view(shape)
