"""Matrix products of the factored form, and the memory that they are made in."""

from __future__ import annotations

import functools
import math
import threading

import torch

# Bytes of the largest intermediate of a chunk. CPU: docs/benchmark.md. Others: a guess.
CHUNK_BYTES = {"cpu": 2 << 20, "other": 256 << 20}
# What a thread keeps at most for intermediates of its next call
SCRATCH_BYTES = 8 << 20
# Products of at most so many multiplications take torch.mm
SMALL_PRODUCT = 1 << 22


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``; ``a`` should be contiguous, ``b`` may be a transposed view.

    In float32 on a CPU by the matrix product of oneDNN, which torch uses for linear layers that it compiles,
    where this torch has it: there it takes 0.7 to 0.95 times as long as ``torch.mm``, but for small products,
    of which each costs some 20 us more.
    """
    large = a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() * b.shape[1] > SMALL_PRODUCT
    if large and torch.backends.mkldnn.enabled and _has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


@functools.cache
def _has_onednn_linear() -> bool:
    """Whether the operator is there and gives the product of a matrix with a transposed view; it is none
    that torch documents.
    """
    a, b = (torch.arange(n, dtype=torch.float32, device="cpu").view(-1, 3) for n in (6, 12))
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, b.t().contiguous().t(), None, "none", [], "")
        return found.tolist() == [[5, 14, 23, 32], [14, 50, 86, 122]]
    except (AttributeError, RuntimeError, TypeError):
        return False


def chunk_bytes(tensor) -> int:
    return CHUNK_BYTES["cpu" if tensor.device.type == "cpu" else "other"]


def units_at_once() -> int:
    """Products of several units' matrices are shared out among threads by the unit; fewer than four at
    once take longer in any case.
    """
    threads = min(torch.get_num_threads(), 16)
    return threads * -(-4 // threads)


def add(total, part):
    return part if total is None else total.add_(part)


class Scratch:
    """One buffer for the large intermediates of all chunks: memory that is new costs as much as what is
    computed in it. On a CPU, whose allocator may give it back to the system after every call, a thread keeps
    it for its next call; meanwhile it belongs to this one alone, whatever a finaliser or a signal brings in
    between.
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

    def __call__(self, like, *shape):
        """An uninitialised tensor, whose predecessor is gone."""
        numbers = math.prod(shape)
        found = self.buffer
        if found is None or len(found) < numbers or found.dtype != like.dtype or found.device != like.device:
            with torch.inference_mode(False):  # it outlives the mode
                self.buffer = torch.empty(numbers, dtype=like.dtype, device=like.device)
        return self.buffer[:numbers].view(shape)
