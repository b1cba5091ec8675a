"""What coda_fast is measured against: a DAU layer as others would write it, by library calls and automatic
differentiation.

Both compute ``y = s(|w|^2) <w, x>`` from ``x [N, C, H, W]``, ``B [r, C, k, k]``, ``A [n, r, C, k, k]``, ``b
[n, C, k, k]`` and return ``[N, n, OH, OW]``. With ``detach`` every ``s * w`` counts as a constant:
explanation mode. A further peer is one function with the decorator ``peer`` in this file: tests,
measurements, tables and plots find it from there.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MATERIALISING, ALGEBRAIC, CHECKPOINTED = "materialising", "algebraic", "algebraic checkpointed"
COMPILED = " compiled"  # suffix of a provider that runs through torch.compile
ARGUMENTS = {"x": None, "B": None, "A": None, "b": None, "stride": 1, "padding": 0, "detach": False}


@dataclasses.dataclass(frozen=True)
class Peer:
    """An entry of the registry; its fields are the arguments of ``peer``."""

    name: str
    layer: Callable
    description: str
    family: str
    slow: bool
    recomputes: bool
    style: tuple[str, str, str] | None


PEERS: dict[str, Peer] = {}  # in the order of the tables


def peer(
    name: str,
    *,
    family: str,
    slow: bool = False,
    recomputes: bool = False,
    style: tuple[str, str, str] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as a peer. The first paragraph of its docstring describes it in the
    documents.

    Args:
        name: its name in rows and tables, which no other provider may have.
        family: the name for it and its variants in the tables.
        slow: a call for a network takes seconds on a CPU, so that it is measured only with all peers.
        recomputes: it saves memory by recomputing, so it is measured only in modes with a backward pass, and
            on a CPU only once for a network.
        style: colour, marker and label in the plots of a growing layer, or None to leave it out.

    Raises:
        ValueError: the name is taken or reserved, or there is no docstring.
        TypeError: the function has other arguments than ARGUMENTS.
    """
    if name in PEERS or name.startswith("coda_fast") or name.endswith(COMPILED):
        raise ValueError(f"name: expected one that is not taken and not of ours or compiled, got {name!r}")

    def register(layer):
        empty = inspect.Parameter.empty
        found = inspect.signature(layer).parameters.items()
        if {key: None if p.default is empty else p.default for key, p in found} != ARGUMENTS:
            raise TypeError(f"{name}: expected the arguments {ARGUMENTS}, got {inspect.signature(layer)}")
        if not (layer.__doc__ or "").strip():
            raise ValueError(f"{name}: expected a function with a docstring, got none")
        description = " ".join(inspect.getdoc(layer).split("\n\n")[0].split())
        PEERS[name] = Peer(name, layer, description, family, slow, recomputes, style)
        return layer

    return register


# Colours that differ in lightness as well as in hue (Okabe and Ito)
@peer(MATERIALISING, family="published", slow=True, style=("#D55E00", "s", "as published"))
def materialising(x, B, A, b, stride=1, padding=0, detach=False):
    """The formula as it is published: unfold, weights by a 1x1 convolution, product, sum, norm.

    Writes ``w``, n d numbers a pixel.
    """
    (n, r), kernel = A.shape[:2], A.shape[3:]
    x = x.contiguous()  # as published; from channels last, w would have to be copied
    z = F.conv2d(x, B, stride=stride, padding=padding)
    generate = A.reshape(n, r, -1).transpose(1, 2).reshape(-1, r, 1, 1)
    w = F.conv2d(z, generate, b.flatten()).flatten(2).unflatten(1, (n, -1))  # [N, n, d, P]
    length = torch.linalg.vector_norm(w, dim=2)
    scale = length / (1 + length.square())
    if detach:
        w, scale = w.detach(), scale.detach()
    patches = F.unfold(x, kernel, stride=stride, padding=padding).unsqueeze(1)
    return (scale * (w * patches).sum(2)).unflatten(2, z.shape[2:])


@peer(ALGEBRAIC, family="algebraic", style=("#0072B2", "^", "algebraic"))
def algebraic(x, B, A, b, stride=1, padding=0, detach=False):
    """What a clever user writes: one convolution with n (r + 1) filters, contracted with [z; 1]; the norm as
    a quadratic form with the Gram matrix of [A b]: the fastest way to it, and the least accurate.

    ``<w, x> = sum_k z_k (A_k . x) + b . x``; the quadratic form is one more convolution. No ``w``, but
    n (r + 1) numbers a pixel, twice.
    """
    n, r = A.shape[:2]
    rows = torch.cat([A.flatten(2), b.reshape(n, 1, -1)], 1)
    gram = rows @ rows.transpose(1, 2)  # [n, r + 1, r + 1]
    z = F.conv2d(x.detach() if detach else x, B, stride=stride, padding=padding)
    v = F.conv2d(z, gram[:, :, :r].reshape(-1, r, 1, 1), gram[:, :, r].flatten()).unflatten(1, (n, r + 1))
    square = ((v[:, :, :r] * z.unsqueeze(1)).sum(2) + v[:, :, r]).clamp_min(torch.finfo(x.dtype).tiny)
    scale = square.sqrt() / (1 + square)
    if detach:
        z, scale = z.detach(), scale.detach()
    filters = rows.reshape(-1, *A.shape[2:])
    if x.is_contiguous(memory_format=torch.channels_last):
        filters = filters.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, filters, stride=stride, padding=padding).unflatten(1, (n, r + 1))
    return scale * ((y[:, :, :r] * z.unsqueeze(1)).sum(2) + y[:, :, r])


@peer(CHECKPOINTED, family="algebraic", recomputes=True)
def checkpointed(x, B, A, b, stride=1, padding=0, detach=False):
    """The algebraic one, recomputed in the backward pass: the peer that is fair in memory."""
    return checkpoint(algebraic, x, B, A, b, stride, padding, detach, use_reentrant=False)
