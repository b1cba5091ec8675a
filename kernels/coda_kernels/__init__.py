"""Triton device code, launch configuration and launchers for coda_fast; imports nothing of coda_fast, and
Triton only when it is used.
"""

from __future__ import annotations

import importlib.util
import os

MINIMUM = (3, 6)


def unavailable(device_type: str = "cuda") -> str | None:
    """Why the kernels cannot serve tensors on such a device; None where they can. Starts no GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch on Linux)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM:
        return f"Triton {triton.__version__} is too old: {'.'.join(map(str, MINIMUM))} or newer is needed"
    from coda_kernels.compile import recorded_device

    if device_type != "cuda" and not interpreted() and recorded_device() is None:
        return (
            f"the kernels need a GPU, the tensors are on {device_type!r} (TRITON_INTERPRET=1 runs them, "
            "slowly, on a CPU)"
        )
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on a CPU; it must be asked for before they are
    imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
