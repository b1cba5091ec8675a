"""What coda_fast is measured against: a DAU layer as others would write it, by library calls and automatic
differentiation.

Both compute ``y = s(|w|^2) <w, x>`` from ``x [N, C, H, W]``, ``B [r, C, k, k]``, ``A [n, r, C, k, k]``, ``b
[n, C, k, k]`` and return ``[N, n, OH, OW]``. With ``detach`` every ``s * w`` counts as a constant:
explanation mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def materialising(x, B, A, b, stride=1, padding=0, detach=False):
    """The formula as it is published: unfold, weights by a 1x1 convolution, product, sum, norm. Writes
    ``w``, n d numbers a pixel.
    """
    (n, r), kernel = A.shape[:2], A.shape[3:]
    x = x.contiguous()  # as published: from channels last, w itself would have to be copied
    z = F.conv2d(x, B, stride=stride, padding=padding)
    generate = A.reshape(n, r, -1).transpose(1, 2).reshape(-1, r, 1, 1)
    w = F.conv2d(z, generate, b.flatten()).flatten(2).unflatten(1, (n, -1))  # [N, n, d, P]
    length = torch.linalg.vector_norm(w, dim=2)
    scale = length / (1 + length.square())
    if detach:
        w, scale = w.detach(), scale.detach()
    patches = F.unfold(x, kernel, stride=stride, padding=padding).unsqueeze(1)
    return (scale * (w * patches).sum(2)).unflatten(2, z.shape[2:])


def algebraic(x, B, A, b, stride=1, padding=0, detach=False):
    """What a clever user writes: ``<w, x> = sum_k z_k (A_k . x) + b . x`` is one convolution with n (r + 1)
    filters, the norm a quadratic form in ``[z; 1]`` with the Gram matrix of ``[A b]``, by one more
    convolution. No ``w``, but n (r + 1) numbers a pixel, twice. The Gram matrix is the fastest way to the
    norm and the least accurate one.
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


def checkpointed(x, B, A, b, stride=1, padding=0, detach=False):
    """``algebraic``, computed again in the backward pass: the memory-fair peer."""
    return checkpoint(algebraic, x, B, A, b, stride, padding, detach, use_reentrant=False)
