"""Triton device code, launch configuration and launchers for coda_fast; imports nothing of coda_fast.

No kernel is part of this version yet: `unavailable` says so, and `coda_fast` answers a request for its "triton" backend with it.
"""

from __future__ import annotations

import importlib.util


def unavailable() -> str | None:
    """Why the kernels cannot be used here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch on Linux)"
    return "this version of coda_fast has no Triton kernels yet"
