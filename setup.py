import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
README = ROOT / "README.md"

version = re.search(
    r'^__version__ = "([^"]+)"',
    (ROOT / "coda_fast" / "_version.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
if version is None:
    raise RuntimeError("coda_fast/_version.py has no line __version__ = ...")

SETUPTOOLS = "setuptools>=77.0.3"  # the first with license_expression; also named in pyproject.toml
CLI = [
    "click>=8.2",
    "tqdm",
    "pillow>=10.1",
    "torchvision",
    "matplotlib",
    "safetensors",
    "scikit-learn",
    "jinja2",
]
VIDEO = [*CLI, "av"]  # brings its own ffmpeg
EVALUATION = [*CLI, "captum>=0.9", "scikit-image>=0.21"]  # the methods of attribution that others made
APP = [*EVALUATION, "av", "gradio>=6.31,<7"]  # a web page to look at explanations
TIMM = ["timm>=1.0.31"]
HUB = ["huggingface_hub", "safetensors", "jinja2"]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
TRAIN = [
    *CLI,
    *TIMM,
    "lightning>=2.6",
    "pydantic>=2.7",
    "pyyaml",
    "tensorboard",
    "webdataset>=1.0",
    "filelock",
]
BENCH = ["torchvision", "bcos", "pytest>=8.2", "pytest-benchmark", "matplotlib", "pillow"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29", "latex2mathml>=3.77"]
TOOLS = [
    "pytest>=8.2",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "psutil",
    "packaging",
    "threadpoolctl",
    "playwright",  # drives the Chromium that is installed; it downloads none
    SETUPTOOLS,
]
FONTS = ["matplotlib-fontja"]  # Japanese and many Chinese characters, for names of classes
TEST = list(dict.fromkeys([*EVALUATION, *VIDEO, *APP, *TRAIN, *HUB, *ONNX, *FONTS, *TOOLS]))
DEV = [*TEST, *BENCH, *DOCS, "ruff==0.17.6", "mypy==2.4.*"]

setup(
    name="coda-fast",
    version=version.group(1),
    description="Convolutional Dynamic Alignment Networks for PyTorch, exact and fast",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(".", include=["coda_fast", "coda_fast.*"]),
        *find_packages("kernels", include=["coda_kernels", "coda_kernels.*"]),
    ],
    package_dir={"coda_kernels": "kernels/coda_kernels"},
    package_data={
        "coda_fast": ["py.typed", "recipes/*.yaml", "weights/*", "viewer/viewer.css", "viewer/viewer.js"],
        "coda_kernels": ["py.typed", "tables/*.json"],
    },
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        "cli": CLI,
        "video": VIDEO,
        "evaluation": EVALUATION,
        "app": APP,
        "quantus": [*EVALUATION, "quantus"],
        "train": TRAIN,
        "timm": TIMM,
        "hub": HUB,
        "onnx": ONNX,
        "fonts": FONTS,
        "bench": BENCH,
        "docs": [*CLI, *DOCS],
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["coda-fast = coda_fast.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
