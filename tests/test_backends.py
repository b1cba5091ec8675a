"""The choice of the backend, and the message if it cannot run."""

import pytest
import torch

import coda_fast
from coda_fast import backends


def test_info_names_every_backend():
    info = coda_fast.backend_info("cpu")
    assert info.auto == "factored"
    assert set(info.reasons) == set(backends.BACKENDS)
    assert all(name in str(info) for name in backends.BACKENDS)


def test_triton_says_why_not(monkeypatch):
    monkeypatch.setattr("coda_kernels.unavailable", lambda kind: f"no kernels for {kind}")
    layer = coda_fast.DAUConv2d(2, 2, 1, rank=1, backend="triton")
    with pytest.raises(
        coda_fast.BackendUnavailable,
        match=r'backend="triton" is not available: no kernels for cpu; use backend="auto"',
    ):
        layer(torch.rand(1, 2, 3, 3))


def test_triton_without_kernel_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "coda_kernels", None)
    with pytest.raises(coda_fast.BackendUnavailable, match="coda_kernels is not importable"):
        backends.choose("triton", torch.device("cuda"), torch.float32)


def test_choose():
    here = torch.device("cpu"), torch.float32
    assert backends.choose("auto", *here) == "factored"
    assert backends.choose("reference", *here) == "reference"
    with pytest.raises(ValueError, match="backend: expected one of"):
        backends.choose("cuda", *here)


def test_float64_of_the_triton_backend_is_the_factored_one(monkeypatch):
    monkeypatch.setattr("coda_kernels.unavailable", lambda kind: None)
    device = torch.device("cuda")
    assert backends.choose("triton", device, torch.float64) == "factored"
    assert all(
        backends.choose("triton", device, dtype) == "triton"
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


@pytest.mark.parametrize("verified", [True, False])
def test_auto_takes_the_kernels_where_they_are_verified(verified, monkeypatch):
    monkeypatch.setattr("coda_kernels.unavailable", lambda kind: None)
    monkeypatch.setattr(backends, "_verified", lambda device: verified and device.type == "cuda")
    assert backends.choose("auto", torch.device("cuda"), torch.bfloat16) == (
        "triton" if verified else "factored"
    )
    assert backends.choose("auto", torch.device("cuda"), torch.float64) == "factored"
    assert backends.choose("auto", torch.device("cpu"), torch.bfloat16) == "factored"
    assert ("not verified" in coda_fast.backend_info("cuda").reasons["triton"]) != verified


@pytest.mark.parametrize(
    ("interpret", "kind", "says"), [("1", "cpu", None), ("0", "cpu", "need a GPU"), ("0", "cuda", None)]
)
def test_what_the_kernels_need(interpret, kind, says, monkeypatch):
    import coda_kernels

    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    missing = coda_kernels.unavailable(kind)
    assert missing is None if says is None else says in missing


def test_an_old_triton_is_refused(monkeypatch):
    import triton

    import coda_kernels

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1 is too old: 3.6 or newer" in coda_kernels.unavailable("cuda")


def test_a_triton_that_does_not_compile_for_amd_is_refused_there(monkeypatch):
    import triton

    import coda_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(triton, "__version__", "3.6.0+rocm6.4")
    message = "Triton 3.6.0+rocm6.4 is too old: 3.8 or newer is needed for AMD GPUs"
    assert coda_kernels.unavailable("cuda") == message
    assert coda_kernels.unavailable("cpu") is None
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    assert coda_kernels.unavailable("cuda") is None
