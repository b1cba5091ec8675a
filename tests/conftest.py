"""Shared by all tests: deterministic seeds, memory that is not zero by accident, and where the fused
kernels run.
"""

import importlib.util
import os
import random

import numpy as np
import pytest
import quick_interpreter
import torch

if not torch.cuda.is_available():
    # before anything imports the kernels: they run on the CPU then
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
    """Fixed seeds, and torch.empty filled with NaN: an element that nobody wrote cannot pass for a zero."""
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
