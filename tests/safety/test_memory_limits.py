"""Sizes and counts that the memory of the machine cannot hold are refused before any work."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from support_safety import refusal, run, write_inputs

import coda_fast
from coda_fast import cli, explain, safety


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path / "in")


@pytest.mark.parametrize("command", ["explain", "report"])
def test_a_strip_is_not_enlarged_to_a_huge_one(inputs, tmp_path, capsys, command):
    Image.new("L", (20000, 1), 90).save(tmp_path / "strip.png")
    options = ("--checkpoint", inputs / "net.safetensors", "--output", tmp_path / "out")
    line = refusal(capsys, command, tmp_path / "strip.png", *options, "--size", 8)
    assert (
        "strip.png: expected an image at most 256 times as long as wide to enlarge its shorter side to 8 "
        "pixels, got 20000 x 1" in line
    )
    assert not (tmp_path / "out").exists()
    # without --size, the network sees the middle of the strip
    assert run(capsys, command, tmp_path / "strip.png", *options)[0] == 0


@pytest.mark.parametrize("command", ["explain", "report"])
def test_what_the_machine_cannot_hold_is_refused_before_any_work(
    inputs, tmp_path, capsys, monkeypatch, command
):
    """On a machine with 8 MiB, an explanation of 300 x 200 pixels is too large, and one of 8 x 8 is not."""
    Image.new("L", (300, 200), 90).save(tmp_path / "large.png")
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 8 << 20)
    options = ("--checkpoint", inputs / "net.safetensors", "--size", 0, "--output", tmp_path / "out")
    line = refusal(capsys, command, inputs / "a.png", tmp_path / "large.png", *options)
    assert (
        "large.png: an explanation of 300 x 200 pixels: expected what fits into the 0.00781 GiB of this "
        "machine, got what needs" in line
    )
    assert not (tmp_path / "out").exists()
    assert run(capsys, command, inputs / "a.png", *options)[0] == 0


def test_the_estimate_of_an_explanation(monkeypatch):
    """The estimate is within a factor of two of the peak memory of the tensors of an explanation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = coda_fast.create_model("coda_s_cifar10").eval()
    images = torch.rand(1, 3, 160, 160)

    class Peak(TorchDispatchMode):
        """The largest total size of the storages alive after any operation."""

        def __init__(self):
            super().__init__()
            self.alive, self.peak = {}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            import weakref

            found = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage._cdata
                    if key not in self.alive:
                        self.alive[key] = storage.nbytes()
                        weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))
            return found

    with Peak() as watched:
        model.explain(images, [[1, 2]])
    estimate = explain.explanation_memory(model, 160, 160, 2)
    assert estimate / 2 < watched.peak < 2 * estimate


def test_a_large_picture_is_explained_or_refused_by_a_stated_bound(inputs, tmp_path, capsys, monkeypatch):
    """An explanation of 24 megapixels would take 11 GiB with this network, which a small machine refuses."""
    Image.new("L", (6000, 4000), 90).save(tmp_path / "photo.png")
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 8 << 30)
    options = ("--checkpoint", inputs / "net.safetensors", "--size", 0, "--output", tmp_path / "out")
    assert "expected what fits into the 8 GiB of this machine" in refusal(
        capsys, "explain", tmp_path / "photo.png", *options
    )
    model = coda_fast.load(inputs / "net.safetensors")
    explain.check_explainable(model, 1200, 1600, "photo", 2)  # 2 megapixels are accepted


def test_batches_shrink_with_the_size_of_images():
    model = coda_fast.create_model("coda_xs_digits")
    assert explain.batch_within(model, 8, 8, 256) == 256
    assert explain.batch_within(model, 20_000, 20_000, 256) == 1
    some = explain.batch_within(model, 400, 400, 256)
    assert 1 < some < 256
    assert some * explain.explanation_memory(model, 400, 400) <= 1 << 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "removal", "--points", 10**12), "--points"),
        (("--side", 10**9), "--side"),
        (("--metric", "removal", "--size", 1), "fraction: expected at least one pixel of 1, got 0"),
        (("--size", 10**9), "--size"),
        (
            ("--methods", "RISE", "--set", "RISE.masks=1e12"),
            "RISE: masks: expected at most 100000, got 1000000000000",
        ),
        (
            ("--methods", "RISE", "--set", "RISE.masks=1e999"),
            "RISE: masks: expected an int of at least 1, got inf",
        ),
        (
            ("--methods", "RISE", "--set", "RISE.masks=nan"),
            "RISE: masks: expected an int of at least 1, got nan",
        ),
        (("--methods", "RISE", "--set", "RISE.cells=1e6"), "RISE: cells: expected at most 64"),
        (("--methods", "RISE", "--set", "RISE.seed=1e30"), "RISE: seed: expected at most 4294967295"),
        (("--methods", "Occ5", "--set", "Occ5.size=1e12"), "Occ5: size: expected at most"),
        (("--methods", "Occ5", "--set", "Occ5.size=0"), "Occ5: size: expected an int of at least 1, got 0"),
        (
            ("--methods", "IntGrad", "--set", "IntGrad.n_steps=1e12"),
            "IntGrad: n_steps: expected at most 10000",
        ),
        (("--methods", "LIME", "--set", "LIME.samples=1e12"), "LIME: samples: expected at most"),
        (
            ("--methods", "LIME", "--set", "LIME.kernel_size=1e9"),
            "LIME: kernel_size: expected a positive number up to 100",
        ),
    ],
    ids=str,
)
def test_options_that_size_memory(inputs, tmp_path, capsys, arguments, message):
    pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    options = (
        "--checkpoint",
        inputs / "net.safetensors",
        "--data",
        "digits",
        "--limit",
        8,
        "--output",
        tmp_path / "out",
    )
    assert message in refusal(capsys, "evaluate", *options, *arguments)
    assert not (tmp_path / "out").exists()


def test_grids_and_data_that_the_machine_cannot_hold(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 100 << 20)
    options = ("--checkpoint", inputs / "net.safetensors", "--data", "digits", "--output", tmp_path / "out")
    assert "data: 450 images of 2048 x 2048 pixels: expected what fits" in refusal(
        capsys, "evaluate", *options, "--size", 2048
    )
    line = refusal(capsys, "evaluate", *options, "--size", 100, "--limit", 40, "--side", 10)
    assert "data: digits: an explanation of 1000 x 1000 pixels: expected what fits" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--epochs", 10**12),
        ("compile", "coda_xs_digits", "--size", 10**9),
        ("compile", "coda_xs_digits", "--workers", 10**9),
    ],
    ids=str,
)
def test_options_that_would_never_end(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments[-2] in refusal(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line(inputs, tmp_path, capsys, monkeypatch):
    for error in (
        MemoryError("Unable to allocate 1 TiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(coda_fast.CoDANet, "explain", fail)
        line = refusal(
            capsys,
            "explain",
            inputs / "a.png",
            "--checkpoint",
            inputs / "net.safetensors",
            "--output",
            tmp_path / "out",
        )
        assert line.startswith("coda-fast: not enough memory: ")
    monkeypatch.setattr(coda_fast.CoDANet, "explain", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.main(
            [
                "explain",
                str(inputs / "a.png"),
                "--checkpoint",
                str(inputs / "net.safetensors"),
                "--output",
                str(tmp_path / "out"),
            ]
        )


def test_the_limits_of_a_machine():
    """The memory of the machine, and a smaller limit that the shell sets."""
    look = "print(safety.machine_memory());"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({9 << 30}, {9 << 30}));"
    done = subprocess.run(
        [sys.executable, "-c", f"from coda_fast import safety; {look} {limit} {look}"],
        capture_output=True,
        text=True,
    )
    found = [int(line) for line in done.stdout.split()]
    assert found[0] == safety.machine_memory() > 1 << 30
    assert found[1] == min(found[0], 9 << 30)
