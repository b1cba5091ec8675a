"""Matrix products of the factored form, and the memory that they are made in."""

from __future__ import annotations

import functools
import math
import threading

import torch

# Bytes of the largest intermediate of a chunk. CPU: docs/benchmark.md. Others: a guess.
CHUNK_BYTES = {"cpu": 2 << 20, "other": 256 << 20}
# A thread keeps a buffer of at most so many bytes for its next call
SCRATCH_BYTES = 8 << 20
# Products of at most so many multiplications take torch.mm
SMALL_PRODUCT = 1 << 22


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``; ``a`` should be contiguous, ``b`` may be a transposed view.

    On a CPU in float32 it is oneDNN's product, which torch uses for compiled linear layers, where this torch
    has it: it takes 0.7 to 0.95 times as long as ``torch.mm``, except for small products, where a call costs
    about 20 us more.
    """
    large = a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() * b.shape[1] > SMALL_PRODUCT
    if large and torch.backends.mkldnn.enabled and _has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


@functools.cache
def _has_onednn_linear() -> bool:
    """Whether the operator exists and multiplies a matrix with a transposed view. torch does not document
    it, so it is tried.
    """
    a, b = (torch.arange(n, dtype=torch.float32, device="cpu").view(-1, 3) for n in (6, 12))
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, b.t().contiguous().t(), None, "none", [], "")
        return found.tolist() == [[5, 14, 23, 32], [14, 50, 86, 122]]
    except (AttributeError, RuntimeError, TypeError):
        return False


def chunk_bytes(tensor: torch.Tensor) -> int:
    """The budget of an intermediate on the device of ``tensor``."""
    return CHUNK_BYTES["cpu" if tensor.device.type == "cpu" else "other"]


def units_at_once() -> int:
    """How many units one batched product takes: torch shares it out among threads by the unit, and fewer
    than four at once are slower whatever the number of threads.
    """
    threads = min(torch.get_num_threads(), 16)
    return threads * -(-4 // threads)


def add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """``total + part`` in place, where None counts as zero."""
    return part if total is None else total.add_(part)


def stacked(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Matrices one below the other, None if there are none."""
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None


class Scratch:
    """One buffer for the large intermediates of all chunks, because the first use of new memory costs as much
    as what is computed in it. On a CPU, whose allocator may return memory to the system after every call, the
    thread keeps the buffer for its next call. During a call nobody else has it: a finaliser or a signal
    handler that calls a layer in between makes its own.
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
        """An uninitialised tensor in the buffer; the one of the call before is overwritten."""
        numbers = math.prod(shape)
        found = self.buffer
        if found is None or len(found) < numbers or found.dtype != like.dtype or found.device != like.device:
            with torch.inference_mode(False):  # the buffer outlives the mode
                self.buffer = torch.empty(numbers, dtype=like.dtype, device=like.device)
        return self.buffer[:numbers].view(shape)
