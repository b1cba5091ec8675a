"""Choice of the backend, and what is said where one cannot run."""

import pytest
import torch

import coda_fast
from coda_fast import backends


def test_info_names_every_backend():
    info = coda_fast.backend_info("cpu")
    assert info.auto == "factored"
    assert set(info.reasons) == set(backends.BACKENDS)
    assert all(name in str(info) for name in backends.BACKENDS)


def test_triton_says_why_not():
    layer = coda_fast.DAUConv2d(2, 2, 1, rank=1, backend="triton")
    with pytest.raises(coda_fast.BackendUnavailable, match=r'backend="triton" is not available: .*use backend="auto"'):
        layer(torch.rand(1, 2, 3, 3))


def test_triton_without_kernel_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "coda_kernels", None)
    with pytest.raises(coda_fast.BackendUnavailable, match="coda_kernels is not importable"):
        backends.choose("triton")


def test_choose():
    assert backends.choose("auto").__name__ == "coda_fast.backends.factored"
    assert backends.choose("reference").__name__ == "coda_fast.backends.reference"
    with pytest.raises(ValueError, match="backend: expected one of"):
        backends.choose("cuda")
