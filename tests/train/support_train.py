"""Helpers for the tests of training: a tiny network on digits, runs in this process and in others, and images
that can be told apart by their brightness.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import support
import torch
from PIL import Image

from coda_fast import train
from coda_fast.data.sources import Process
from coda_fast.train.recipes import Data, load_recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.out_channels=[4, 10]",
    "model.ranks=[4, 4]",
    "model.kernel_sizes=[3, 3]",
    "model.strides=[2, 1]",
    "epochs=2",
    "log.maps=0",
    "log.tensorboard=false",
    "log.every=4",
    "accelerator=cpu",
)
NET = (
    "model.name=coda_s_cifar10",
    "model.out_channels=[4, 3]",
    "data.kind=folder",
    "data.resize=24",
    "data.size=16",
    "data.workers=0",
    "batch_size=8",
    "epochs=1",
    "precision=float64",
)
ONE = Process(0, 1)


def folder_data(folder, **options):
    """The data of a recipe: the images of ``folder``, resized to 24 and cropped to 16 pixels."""
    return Data(kind="folder", path=str(folder), **{"resize": 24, "size": 16, "workers": 0, **options})


def recipe(*overrides, name="digits-s"):
    return load_recipe(name, [*TINY, *overrides])


def run(output, *overrides, resume=None):
    """Train in this process, and return the last row of the history."""
    return train.run(recipe(*overrides), output, resume, progress=False)


def environment(**more):
    """The environment of a process that imports this source tree, with tracebacks of crashes."""
    return support.environment(**{"PYTHONFAULTHANDLER": 1} | more)


_STUCK = """
import builtins, os, time
plain = builtins.open
def stuck(file, *arguments, **options):
    if isinstance(file, (str, os.PathLike)) and os.path.basename(file) == os.environ["CODA_STUCK"]:
        time.sleep(3600)
    return plain(file, *arguments, **options)
builtins.open = stuck
"""


def stuck(folder, name):
    """Variables to add to the environment of a process, in which opening a file called ``name`` blocks, as on
    storage that does not answer.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_STUCK)
    return {"PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]]), "CODA_STUCK": name}


def command(output, *overrides, launcher=(), program=("-m", "coda_fast.train"), options=("--quiet",)):
    """The command line of a run in another process, or in several (``launcher``: options of torchrun)."""
    start = ("-m", "torch.distributed.run", *launcher) if launcher else ()
    return [
        sys.executable,
        *map(str, (*start, *program, "digits-s", *TINY, *overrides, "--output", output, *options)),
    ]


def finished(arguments, code=0, **more):
    """Run the command to its end, and return standard output and error. AssertionError: another exit code."""
    done = subprocess.run(arguments, env=environment(**more), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def checkpoint_at(output, epoch=2, step=0):
    """The content of the checkpoint at a position."""
    return torch.load(output / "checkpoints" / f"epoch_{epoch:04d}_step_{step:07d}.pt", weights_only=True)


def assert_same(a, b, bound=0.0):
    """Assert that weights, moving average and optimiser of two checkpoints differ by at most ``bound``; 0
    means bit for bit.
    """
    for part in ("model", "ema"):
        assert (a[part] is None) == (b[part] is None)
        for name, tensor in (a[part] or {}).items():
            worst = float((tensor.double() - b[part][name].double()).abs().max())
            assert worst <= bound, f"{part} {name}: {worst}"
    assert a["updates"] == b["updates"]
    moments = [state["optimizer"]["state"] for state in (a, b)]
    for name, values in moments[0].items():
        for key, tensor in values.items():
            first, second = (torch.as_tensor(value).double() for value in (tensor, moments[1][name][key]))
            assert float((first - second).abs().max()) <= max(bound, 0.0), f"{name} {key}"


def losses(output):
    """The loss at each update that was logged."""
    lines = (Path(output) / "steps.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    return {int(row["updates"]): float(row["loss"]) for row in rows}


def picture(value, size=(40, 30), mode="RGB"):
    """A JPEG of one colour, as bytes; (width, height)."""
    buffer = io.BytesIO()
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tree(root, counts, start=0, size=(40, 30)):
    """Write root/CLASS/NUMBER.JPEG, as many images of each class as ``counts`` says. Each image has its own
    brightness.
    """
    value = start
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.JPEG").write_bytes(picture(value, size))
            value += 4
    return root


def save_npz(path, changes):
    """Write three black images to train and to test with, with some of the arrays replaced by ``changes``."""
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.arange(3)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(path, **{**arrays, **changes})
    return path


def class_folders(folder):
    """Write 24 images in three classes to train with, and 11 to validate with."""
    tree(folder / "train", {"ant": 9, "bee": 7, "cat": 8})
    tree(folder / "val", {"ant": 3, "bee": 4, "cat": 4}, 100)
    return folder
