"""Shared by all tests: deterministic seeds, and memory that is not zero by accident."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    """A fixed seed, and torch.empty filled with NaN: an element that nobody wrote cannot pass for a zero."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
