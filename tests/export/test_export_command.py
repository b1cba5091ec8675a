"""The command `coda-fast export`, its errors, the example that reads the file, and AOTInductor packages."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from odd_pictures import odd_files
from support import ROOT, assert_close, environment
from support_export import digits, trained_network
from torch import nn

import coda_fast
import coda_fast.data
from coda_fast import cli
from coda_fast import export as exporter

pytest.importorskip("onnx", reason="needs the extra coda-fast[onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra coda-fast[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra coda-fast[onnx]")
EXAMPLE = ROOT / "examples" / "onnx_explanation.py"


@pytest.fixture(scope="module")
def trained():
    return trained_network()


def test_import_is_light():
    """``import coda_fast`` does not import torch.onnx and torch._inductor."""
    code = (
        "import sys, coda_fast; print(*(n for n in sys.modules if n.split('.')[:2] in (['torch', 'onnx'], "
        "['torch', '_inductor'])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_all_or_nothing(tmp_path, monkeypatch):
    model = coda_fast.CoDANet([2], [1], [1], [1], temperature=1)
    path = tmp_path / "net.onnx"
    path.write_text("an older file")

    def fails(self, destination, **options):
        Path(destination).write_text("half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        exporter.export_onnx(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_text() == "an older file"


def test_refuses(trained, tmp_path, monkeypatch):
    path = tmp_path / "new" / "net.onnx"
    with pytest.raises(TypeError, match="model: expected a coda_fast.Network, got a Conv2d"):
        exporter.export_onnx(nn.Conv2d(1, 1, 1), path)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .onnx, got net.pt2"):
        exporter.export_onnx(trained, "net.pt2")
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .pt2, got net.onnx"):
        exporter.export_pt2(trained, "net.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        exporter.export_onnx(trained, tmp_path / "folder.onnx")
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        exporter.export_onnx(trained, path, size=0)
    with pytest.raises(ValueError, match="the kernel does not fit"):
        exporter.export_onnx(coda_fast.CoDANet([2], [2], [9], [1], [0], temperature=1), path, size=8)
    monkeypatch.setattr(exporter, "ONNX_LIMIT", 1000)
    with pytest.raises(
        ValueError,
        match="expected at most 1000 bytes of weights, what one ONNX file holds, got 380736; export to pt2",
    ):
        exporter.export_onnx(trained, path)
    for missing in ("onnx", "onnxscript"):
        refused = pytest.raises(ImportError, match=rf"needs {missing}: pip install 'coda-fast\[onnx\]'")
        with mock.patch.dict(sys.modules, {missing: None}), refused:
            exporter.export_onnx(trained, path)
    assert not path.parent.exists()


def test_example_size_leaves_no_single_pixels():
    """torch.export treats a size of one pixel as a constant, so no map of the example input has it."""
    model = coda_fast.CoDANet([2, 2], [2, 2], [64, 3], [32, 1], [0, 0], temperature=1)
    size = exporter._example_size(model)
    assert min(exporter._check_size(model, size)) > 1
    assert size[0] != size[1]


def command(*arguments):
    """Run `coda-fast export`, and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *map(str, arguments)])
    return stop.value.code or 0


@pytest.fixture
def checkpoint(trained, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(trained, path)
    return path


def test_command_and_example(trained, checkpoint, tmp_path, monkeypatch, capsys):
    """The commands of docs/export.md. The example runs without torch and coda_fast."""
    Image = pytest.importorskip("PIL.Image", reason="needs the extra coda-fast[cli]")
    monkeypatch.chdir(tmp_path)
    assert command("net.safetensors", "--explain") == 0
    assert re.fullmatch(
        r"net.safetensors: logits and contribution map of images of any size, 0\.\d MB -> net.onnx\n",
        capsys.readouterr().out,
    )
    image, label = digits()[0][1510, 0], int(digits()[1][1510])
    Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save("scan.png")
    code = f"""
        import runpy, sys
        sys.modules["torch"] = sys.modules["coda_fast"] = None
        sys.argv = ["example", *sys.argv[2:]]
        runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), "--", "net.onnx", "scan.png"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    e = trained.explain(torch.from_numpy(np.asarray(Image.open("scan.png"), np.float32) / 255)[None, None])
    assert int(e.target) == label
    said = {line[:15].strip(): line[15:].split()[0] for line in done.stdout.splitlines()[1:]}
    assert done.stdout.startswith(
        f"scan.png: digit {label}, probability {float(e.logits[0, label].sigmoid()):.1%}"
    )
    assert float(said["logit"]) == pytest.approx(float(e.logits[0, label]), abs=1e-5)
    assert float(said["map + bias"]) == pytest.approx(float(e.logits[0, label]), abs=1e-5)
    assert float(said["difference"]) < 1e-5
    page = np.asarray(Image.open(said["picture"]).convert("RGB")).astype(int)
    best = divmod(int(e.contribution_map[0, 0].argmax()), 8)
    assert tuple(page[best]) == (255, 0, 0), "the pixel with the largest contribution is red"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_reads_pictures_as_the_network_does(channels, tmp_path):
    """The example follows the preprocessing named in the file, except for 16-bit images and narrow strips,
    which it does not support.
    """
    transform = coda_fast.data.Preprocessing(channels, 20, 16)
    read = runpy.run_path(str(EXAMPLE))["read_picture"]
    for name, data in odd_files().items():
        if not name.startswith(("broken", "grey16", "deep", "float", "strip", "tower")):
            (tmp_path / name).write_bytes(data)
            found = read(tmp_path / name, transform.config() | {"channels": channels})
            assert np.array_equal(found[0], transform(tmp_path / name).numpy()), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors"], "missing.safetensors: no such checkpoint"),
        (
            ["net.safetensors", "--output", "net.safetensors"],
            "output: expected another file than those that are read, got net.safetensors",
        ),
        (
            ["net.safetensors", "--output", "link.onnx"],
            "output: expected another file than those that are read, got link.onnx",
        ),
        (
            ["net.safetensors", "--output", "hard.onnx"],
            "output: expected another file than those that are read, got hard.onnx",
        ),
        (["link.onnx"], "output: expected another file than those that are read, got link.onnx"),
        (["net.safetensors", "--output", "net.pt2"], "path: expected a name that ends in .onnx, got net.pt2"),
        (["net.safetensors", "--output", "net.safetensors/x.onnx"], "net.safetensors"),
        (["net.safetensors", "--format", "tflite"], "'tflite' is not one of 'onnx', 'pt2'"),
        (["net.safetensors", "--size", "0"], "--size"),
        (["net.safetensors", "--size", "100000"], "--size"),
        (["net.safetensors", "--device", "warp"], "--device: 'warp' cannot be used here"),
    ],
    ids=str,
)
def test_command_refuses(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("link.onnx").symlink_to(checkpoint)
    os.link(checkpoint, "hard.onnx")
    before, content = sorted(p.name for p in tmp_path.iterdir()), checkpoint.read_bytes()
    assert command(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("coda-fast: ")
    assert message in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert checkpoint.read_bytes() == content


def test_no_compiler(checkpoint, tmp_path, monkeypatch, capsys):
    """One line names the missing compiler, on a machine without one or where CXX names none."""
    monkeypatch.chdir(tmp_path)
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert command("net.safetensors", "--format", "pt2") == 2
    assert capsys.readouterr().err == (
        "coda-fast: export to pt2 needs a C++ compiler: install g++, or name one in the environment "
        "variable CXX\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.slow
def test_package_of_aotinductor(trained, checkpoint, tmp_path):
    """The package runs in a process without coda_fast, with its inputs checked, for batch sizes and image
    sizes other than the exported ones.
    """
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("AOTInductor needs a C++ compiler: none of g++, clang++, c++ is here")
    path = tmp_path / "net.pt2"
    assert command(checkpoint, "--format", "pt2", "--explain", "--output", path) == 0
    images, classes = digits()
    cases = [(images[1500:1501], classes[1500:1501]), (images[1500:1507], classes[1500:1507])]
    cases.append((F.interpolate(images[1500:1503], (13, 19), mode="bilinear"), torch.tensor([9, 0, 4])))
    torch.save(cases, tmp_path / "cases.pt")
    code = """
        import sys
        sys.modules["coda_fast"] = None  # an import would fail
        import torch, torch._inductor
        package = torch._inductor.aoti_load_package("net.pt2")
        torch.save([package(*case) for case in torch.load("cases.pt")], "results.pt")
        print(package.get_metadata()["class_names"], package.get_metadata()["logit_bias"])
    """
    without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "AOTI_RUNTIME_CHECK_INPUTS": "1"
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=without_path,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == repr(trained.logit_bias)
    assert json.loads(done.stdout.rpartition(" ")[0]) == trained.class_names
    for (some, target), (logits, contribution_map) in zip(
        cases, torch.load(tmp_path / "results.pt"), strict=True
    ):
        e = trained.explain(some, target)
        assert_close(logits, e.logits, 1e-5)
        assert_close(contribution_map, e.contribution_map[:, 0], 1e-5, terms=[e.logits])
        total = contribution_map.sum((1, 2), dtype=torch.float64) + trained.logit_bias
        assert_close(
            total, logits.gather(1, target[:, None])[:, 0], 1e-6, terms=[e.contributions.abs().sum((2, 3, 4))]
        )
