"""The distribution: the content and requirements of the wheel, and that the installed packages import
lightly, with and without Triton.
"""

import email
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import coda_fast

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEAVY = {
    "PIL",
    "av",
    "click",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "safetensors",
    "sklearn",
    "timm",
    "tqdm",
    "yaml",
}
DIST_INFO = f"coda_fast-{coda_fast.__version__}.dist-info"

PROBE = """
import json, sys
if sys.argv[1] == "without":
    sys.modules["triton"] = None
import torch

initialised = []
lazy_init = torch.cuda._lazy_init
torch.cuda._lazy_init = lambda: (initialised.append(True), lazy_init())
before = set(sys.modules)

import coda_fast, coda_kernels

print(json.dumps({
    "files": [coda_fast.__file__, coda_kernels.__file__],
    "version": coda_fast.__version__,
    "cuda": torch.cuda.is_initialized() or bool(initialised),
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "triton": coda_fast.backend_info("cpu").reasons["triton"],
    "kernels": coda_kernels.unavailable(),
}))
"""


def python(*arguments, cwd, path=None):
    """Standard output of a Python process that cannot import packages of the tree. `path`: a folder to import
    from.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the tree, so that building leaves no files in it, with the folders that no distribution may
    install.
    """
    folder = tmp_path_factory.mktemp("sources")
    for name in ("coda_fast", "kernels", "tests", "bench", "tools", "experiments"):
        if (ROOT / name).exists():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden")
            )
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel, built from the source distribution as for a release."""
    pytest.importorskip(
        "setuptools", minversion="77.0.3", reason="building needs the setuptools of the extra coda-fast[test]"
    )
    folder = tmp_path_factory.mktemp("dist")
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=sources)
    (sdist,) = folder.iterdir()
    assert sdist.name == f"coda_fast-{coda_fast.__version__}.tar.gz"
    python(
        "-m",
        "pip",
        "wheel",
        sdist,
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        folder,
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "install", wheel, "--no-deps", "--no-index", "--target", folder, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{DIST_INFO}/METADATA"))


@pytest.fixture(scope="module", params=["with", "without"])
def imported(request, installed, tmp_path_factory):
    """The modules that a new process has after importing the packages, `with` or `without` Triton."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return request.param, json.loads(python("-c", PROBE, request.param, cwd=elsewhere, path=installed))


def test_the_wheel_holds_the_two_packages_whole_and_nothing_else(wheel, sources):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {"coda_fast", "coda_kernels", DIST_INFO}
    modules = {path.relative_to(sources).as_posix() for path in sources.glob("coda_fast/**/*.py")}
    modules |= {path.relative_to(sources / "kernels").as_posix() for path in sources.glob("kernels/**/*.py")}
    assert {"coda_fast/backends/reference.py", "coda_kernels/__init__.py"} <= modules
    assert {name for name in names if name.endswith(".py")} == modules
    recipes = {path.relative_to(sources).as_posix() for path in sources.glob("coda_fast/recipes/*.yaml")}
    assert "coda_fast/recipes/digits-s.yaml" in recipes
    assert {name for name in names if name.endswith(".yaml")} == recipes
    assert {"coda_fast/py.typed", "coda_kernels/py.typed"} <= names
    assert {"coda_fast/viewer/viewer.css", "coda_fast/viewer/viewer.js"} <= names


def test_the_wheel_carries_the_licence(wheel, metadata):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"{DIST_INFO}/licenses/LICENSE")
    assert text == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in text
    assert b"END OF TERMS AND CONDITIONS" in text
    assert metadata["License-Expression"] == "Apache-2.0"


def test_name_version_and_python(metadata):
    assert metadata["Name"] == "coda-fast"
    assert metadata["Version"] == coda_fast.__version__
    python_versions = SpecifierSet(metadata["Requires-Python"])
    assert "3.10" in python_versions
    assert "3.9" not in python_versions


def test_the_library_needs_torch_and_numpy_only(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {
        r.name: str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})
    }
    assert core == {"torch": ">=2.11", "numpy": ""}
    assert "triton" not in {r.name for r in requirements}


def test_extras(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    extras = {
        extra: {
            r.name: str(r.specifier)
            for r in requirements
            if r.marker is not None and r.marker.evaluate({"extra": extra})
        }
        for extra in metadata.get_all("Provides-Extra")
    }
    assert set(extras) == {
        "bench",
        "cli",
        "evaluation",
        "app",
        "quantus",
        "train",
        "timm",
        "hub",
        "onnx",
        "fonts",
        "video",
        "test",
        "docs",
        "dev",
    }
    assert set(extras["cli"]) == {
        "click",
        "tqdm",
        "pillow",
        "torchvision",
        "matplotlib",
        "safetensors",
        "scikit-learn",
        "jinja2",
    }
    assert set(extras["evaluation"]) == {*extras["cli"], "captum", "scikit-image"}
    assert set(extras["app"]) == {*extras["evaluation"], *extras["video"], "gradio"}
    assert set(extras["video"]) == {*extras["cli"], "av"}
    assert set(extras["timm"]) == {"timm"}
    assert set(extras["hub"]) == {"huggingface_hub", "safetensors", "jinja2"}
    assert set(extras["onnx"]) == {"onnx", "onnxscript", "onnxruntime"}
    assert set(extras["fonts"]) == {"matplotlib-fontja"}
    added = {"lightning", "timm", "pydantic", "pyyaml", "tensorboard", "webdataset", "filelock"}
    assert set(extras["train"]) == {*extras["cli"], *added}
    needed = {
        *extras["train"],
        *extras["evaluation"],
        *extras["video"],
        *extras["app"],
        *extras["hub"],
        *extras["onnx"],
        *extras["fonts"],
        "pytest",
        "setuptools",
    }
    assert needed < set(extras["test"]) < set(extras["dev"])
    assert {"torchvision", "bcos", "pytest-benchmark"} < set(extras["bench"]) < set(extras["dev"])
    assert (
        {"mkdocs", "mkdocs-material", "mkdocstrings", "latex2mathml"}
        < set(extras["docs"])
        < set(extras["dev"])
    )
    assert extras["dev"]["ruff"].startswith("==")
    assert extras["dev"]["mypy"].startswith("==")


def test_the_installed_packages_are_the_ones_imported(imported, installed):
    _, seen = imported
    assert seen["files"] == [str(installed / name / "__init__.py") for name in ("coda_fast", "coda_kernels")]
    assert seen["version"] == coda_fast.__version__


def test_the_import_neither_starts_cuda_nor_loads_what_only_the_command_line_needs(imported):
    _, seen = imported
    assert not seen["cuda"]
    assert {"coda_fast", "coda_kernels"} <= set(seen["loaded"])
    assert not HEAVY & set(seen["loaded"])


def test_the_triton_backend_knows_whether_triton_and_the_kernels_are_there(imported):
    triton, seen = imported
    assert "not importable" not in seen["triton"]
    if triton == "without":
        assert "Triton is not installed" in seen["triton"]
        assert "Triton is not installed" in seen["kernels"]


def test_the_console_script_runs(installed, tmp_path):
    output = python(installed / "bin" / "coda-fast", "--version", cwd=tmp_path, path=installed)
    assert coda_fast.__version__ in output
