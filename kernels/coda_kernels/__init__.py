"""Triton device code, launch configuration and launchers for coda_fast. This package imports nothing from
coda_fast, and imports Triton only when it is used.

Every kernel has a file of its name, with its device code, its launcher ``run`` and, if it has a choice of
tiles, its ``SPEC``; ``config`` chooses tiles, ``layer`` packs parameters, ``compile`` records and compiles
launches, and ``coda_fast.backends.triton`` calls the launchers in order.

Symbols, as in docs/kernels.md except for A_o:

    N, C, H, W       images in a batch, their channels, height and width; OH, OW: size of the output
    P                output pixels, N OH OW; PP: P rounded up to whole blocks of 64
    n                units (output channels), numbered o; n': n rounded up to whole blocks of 16
    r                rank; R: r rounded up to a power of two, at least 16; above 256 to a multiple of 256
    d                numbers in a window, C kh kw; K: in a packed window, kh kw CP, rounded up to whole steps
    CP               channels, rounded up to 8; HP, WP: height and width of the padded image
    SH, SW; DH, DW   stride and dilation, vertical and horizontal
    x, u             the image that weights are computed from, and the one they are applied to (x, in a layer)
    x_p, u_p         their windows at output pixel p
    B, A_o, b_o      reduction weight [r, d]; weight [r, d] and bias [d] of unit o. Here A_o is as
                     it lies in memory; the paper, docs/ and coda_fast.functional use its transpose, [d, r]
    z_p              B x_p
    w_po             A_o^T z_p + b_o, the dynamic weight; q = |w_po|^2
    s(q)             the norm's scale: y_po = s(q) <w_po, u_p>
    beta             <b_o, u_p>
    g                the upstream gradient, dL/dy
    gs, t            g s(q) and 2 g <w, u> s'(q)
    dz, e            the gradient of z; its columns and those of gs as one matrix
    (x)              outer product; gs (x) z has n r numbers for each pixel
    padded image     the zero-padded, channels-last copy [N, HP, WP, CP] of an image, with no border to check
    starts           the offset in it at which the window of each pixel begins
    fold             the transpose of taking windows, as in ``torch.nn.functional.fold``
    contraction      A_o u_p, all n r numbers of a pixel
    program, tile    a Triton program (block of threads), and the block of results that it computes

Prefixes in device code: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ loaded block, s_ stride. Names
in upper case are compile-time constants.
"""

from __future__ import annotations

import importlib.util
import os

MINIMUM = (3, 6)
# For AMD GPUs, Triton 3.6 and 3.7 fail to compile a choice between two pointers, which `prepare` makes.
MINIMUM_AMD = (3, 8)


def unavailable(device_type: str = "cuda") -> str | None:
    """Why the kernels cannot serve tensors on such a device; None if they can. Does not initialise a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch on Linux)"
    import torch
    import triton

    amd = device_type == "cuda" and torch.version.hip is not None
    needed = MINIMUM_AMD if amd else MINIMUM
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < needed:
        return (
            f"Triton {triton.__version__} is too old: {'.'.join(map(str, needed))} or newer is needed"
            f"{' for AMD GPUs' * amd}"
        )
    from coda_kernels.compile import recorded_device

    if device_type != "cuda" and not interpreted() and recorded_device() is None:
        return (
            f"the kernels need a GPU, the tensors are on {device_type!r} (TRITON_INTERPRET=1 runs them, "
            "slowly, on a CPU)"
        )
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on a CPU; it must be enabled before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
