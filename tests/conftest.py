"""Shared by all tests: fixed seeds, uninitialised memory filled with NaN, and the device of the fused
kernels.
"""

import importlib.util
import os
import random

import numpy as np
import pytest
import quick_interpreter
import torch

# Files of this name in several folders would be one module for --doctest-modules; they hold no doctests.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]

if not torch.cuda.is_available():
    # set before the kernels are imported, so that they run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        quick_interpreter.install()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests need a GPU and were skipped; the kernels ran under Triton's interpreter"
        )


@pytest.fixture(autouse=True)
def _deterministic():
    """Fix the seeds, and fill torch.empty with NaN, so that an element that was never written is not taken
    for a zero.
    """
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
