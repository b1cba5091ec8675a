"""Helpers for the tests of safety: commands run in this process, and .npz files written by hand."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coda_fast
from coda_fast import cli

needs_pipes = pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="needs pipes in folders, which this system does not have"
)


def run(capsys, *arguments):
    """Run a command, and return its exit code and the lines on standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return stop.value.code or 0, capsys.readouterr().err.strip().splitlines()


def refusal(capsys, *arguments):
    """Run a command that is refused, and return its one line on standard error."""
    code, lines = run(capsys, *arguments)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("coda-fast: ")
    return lines[0]


def contents(folder):
    """The bytes of every file under the folder, by path."""
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def npy(shape, dtype="|u1", payload=b""):
    """The bytes of an .npy file whose header claims ``shape``, whatever the payload."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + payload


def write_npz(path, compression=zipfile.ZIP_STORED, **members):
    """Write an .npz file of .npy files given as bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def write_inputs(folder):
    """A new folder with two images, a model and an .npz file."""
    folder.mkdir()
    torch.manual_seed(0)
    coda_fast.save(coda_fast.create_model("coda_xs_digits"), folder / "net.safetensors")
    for name, value in (("a.png", 90), ("a_explained.png", 200)):
        Image.new("L", (8, 8), value).save(folder / name)
    np.savez(folder / "d.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    return folder


def removal_of_digits(inputs):
    """The options of a short evaluation by pixel removal."""
    data = ("--data", "digits", "--limit", 3, "--metric", "removal", "--points", 3)
    return ("--checkpoint", inputs / "net.safetensors", *data)
