"""What commands refuse before they work: outputs that are inputs, files that are none, sizes that a
machine cannot hold.
"""

import io
import os
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coda_fast
from coda_fast import cli, safety

posix = pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="needs pipes in folders, which this system does not have"
)


def run(capsys, *arguments):
    """Exit code and the lines on standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return stop.value.code or 0, capsys.readouterr().err.strip().splitlines()


def refused(capsys, *arguments):
    """The one line of a command that refuses."""
    code, lines = run(capsys, *arguments)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("coda-fast: ")
    return lines[0]


def contents(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def place(tmp_path):
    """A folder with two pictures, a model, and a file of arrays."""
    folder = tmp_path / "in"
    folder.mkdir()
    torch.manual_seed(0)
    coda_fast.save(coda_fast.create_model("coda_xs_digits"), folder / "net.safetensors")
    for name, value in (("a.png", 90), ("a_explained.png", 200)):
        Image.new("L", (8, 8), value).save(folder / name)
    np.savez(folder / "d.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    return folder


# -- outputs that are inputs
# ----------------------------------------------------------------------------------------------------------


def other_names(path, tmp_path):
    """The same file: as it is, in other spellings, by links to it and to its folder."""
    (tmp_path / "soft").symlink_to(path)
    os.link(path, tmp_path / "hard")
    (tmp_path / "folder").symlink_to(path.parent, target_is_directory=True)
    spellings = [
        path,
        path.parent / ".." / path.parent.name / path.name,
        f"{path.parent}//./{path.name}",
        os.path.relpath(path),
    ]
    return [*spellings, tmp_path / "soft", tmp_path / "hard", tmp_path / "folder" / path.name]


@pytest.mark.parametrize("victim", ["a.png", "net.safetensors"])
@pytest.mark.parametrize("images", [("a.png",), (".",)], ids=["file", "folder"])
def test_a_report_is_never_written_over_its_inputs(place, tmp_path, capsys, victim, images):
    before = contents(place)
    for output in other_names(place / victim, tmp_path):
        arguments = [place / name for name in images]
        line = refused(
            capsys, "report", *arguments, "--checkpoint", place / "net.safetensors", "--output", output
        )
        assert "output: expected another file than those that are read, got" in line
        assert victim in line
    assert contents(place) == before


def test_a_report_beyond_the_limit_of_a_folder_is_an_input_too(place, capsys):
    for i in range(5):
        Image.new("L", (8, 8), i).save(place / f"b{i}.png")
    before = contents(place)
    for name in before:
        if name.suffix == ".png":
            options = ("--checkpoint", place / "net.safetensors", "--limit", 1, "--output", name)
            assert "expected another file" in refused(capsys, "report", place, *options)
    assert contents(place) == before


def test_a_report_may_be_written_again_and_beside_its_images(place, capsys):
    options = (
        "--checkpoint",
        place / "net.safetensors",
        "--methods",
        "none",
        "--output",
        place / "page.html",
    )
    for _ in range(2):
        assert run(capsys, "report", place, *options)[0] == 0


@pytest.mark.parametrize("linked", [False, True])
def test_a_figure_is_never_written_over_another_image(place, tmp_path, capsys, linked):
    """a.png's figure would be a_explained.png, which is asked for too."""
    before, output = contents(place), place
    if linked:
        output = tmp_path / "out"
        output.mkdir()
        (output / "a_explained.png").symlink_to(place / "a_explained.png")
    arguments = (
        "explain",
        place / "a.png",
        place / "a_explained.png",
        "--checkpoint",
        place / "net.safetensors",
        "--output",
        output,
    )
    assert "which is " in (line := refused(capsys, *arguments))
    assert "a_explained.png" in line
    assert contents(place) == before
    # alone it is an old figure, which a new one replaces
    assert run(capsys, *arguments[:2], *arguments[3:])[0] == 0


def test_a_video_is_never_written_over_its_source(place, tmp_path, capsys):
    pytest.importorskip("av")
    frames = [Image.new("L", (8, 8), 50 * i) for i in range(3)]
    clip = place / "c_explained.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=100)
    os.link(clip, place / "c.gif")
    before = contents(place)
    assert "expected another file" in refused(
        capsys, "explain", place / "c.gif", "--checkpoint", place / "net.safetensors", "--output", place
    )
    assert contents(place) == before


def test_results_never_go_into_the_data(place, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "1").mkdir(parents=True)
    Image.new("L", (8, 8), 90).save(data / "1" / "a.png")
    (tmp_path / "link").symlink_to(data, target_is_directory=True)
    before = contents(tmp_path)
    options = ("--checkpoint", place / "net.safetensors", "--metric", "removal", "--points", 3)
    for output in (
        data,
        data / "1",
        data / "new" / "deeper",
        tmp_path / "link" / "out",
        data / "1" / ".." / "x",
    ):
        line = refused(capsys, "evaluate", "--data", data, *options, "--output", output)
        assert f"output: expected a folder outside of {data}, which is read" in line
    os.link(place / "d.npz", place / "results.csv")
    before = contents(tmp_path)
    for checkpoint, folder in (
        (place / "net.safetensors", place),
        (tmp_path / "own" / "results.json", tmp_path / "own"),
    ):
        if folder != place:
            folder.mkdir()
            os.link(place / "net.safetensors", checkpoint)
            before = contents(tmp_path)
        options = ("--checkpoint", checkpoint, "--metric", "removal", "--points", 3)
        assert "expected another file" in refused(
            capsys, "evaluate", "--data", place / "d.npz", *options, "--output", folder
        )
    assert contents(tmp_path) == before


def test_outputs_that_are_no_files(place, tmp_path, capsys):
    """os.replace would put a file in the place of a device, as root."""
    (tmp_path / "folder.html").mkdir()
    options = ("--checkpoint", place / "net.safetensors", "--output")
    assert "expected a file at" in refused(
        capsys, "report", place / "a.png", *options, tmp_path / "folder.html"
    )
    with pytest.raises(ValueError, match="expected a file at /dev/null, got a device"):
        safety.check_outputs([os.devnull], [])
    for command in ("explain", "report"):
        line = refused(capsys, command, place / "a.png", *options, place / "a.png" / "sub" / "x")
        assert f"got a file: {place / 'a.png'}" in line


# -- files that are none
# ------------------------------------------------------------------------------------------------------------


def _socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


ODD = {
    "pipe": os.mkfifo if hasattr(os, "mkfifo") else None,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
}


@posix
@pytest.mark.parametrize("kind", list(ODD))
def test_what_is_no_file_is_never_waited_for(place, tmp_path, capsys, kind):
    """Asked for by name: one line; in a folder of images or of a class: skipped and named; a folder is a
    folder, whatever its name.
    """
    path = tmp_path / "x.png"
    ODD[kind](path)
    options = ("--checkpoint", place / "net.safetensors", "--output")
    wanted = {
        "loop": "x.png: cannot be read",
        "dangling": "x.png: no such file",
        "folder": "x.png, found none",
    }
    line = refused(capsys, "explain", path, *options, tmp_path / "out").replace(
        "expected an image file, ", ""
    )
    assert wanted.get(kind, f"x.png: got a {kind}") in line
    data = tmp_path / "data"
    (data / "1").mkdir(parents=True)
    Image.new("L", (8, 8), 90).save(data / "1" / "a.png")
    ODD[kind](data / "1" / "x.png")
    code, _ = run(capsys, "report", data, "--methods", "none", *options, tmp_path / "page.html")
    assert code == 0
    text = (tmp_path / "page.html").read_text()
    if kind != "folder":  # of which the report shows what is in it
        assert "Not shown, because they could not be read" in text
    code, lines = run(
        capsys,
        "evaluate",
        "--data",
        data,
        "--metric",
        "removal",
        "--points",
        3,
        *options,
        tmp_path / "results",
    )
    assert code == 0, lines
    assert any(line.startswith(f"skipped {data / '1' / 'x.png'}") for line in lines) == (kind != "folder")
    if kind != "folder":
        line = refused(
            capsys, "evaluate", "--data", path.rename(tmp_path / "x.npz"), *options, tmp_path / "more"
        )
        assert "x.npz" in line


@posix
def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at a file and its opening."""
    (tmp_path / "a").touch()
    regular = os.stat(tmp_path / "a")
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(safety.os, "stat", lambda path: regular)
    with pytest.raises(safety.NotAFile, match="x: expected a file, got a pipe"):
        safety.open_file(tmp_path / "x")


def test_an_image_that_vanishes_or_may_not_be_read(place, tmp_path, capsys, monkeypatch):
    """After it was listed: named, and the others are shown. The tests may run as root, who may read
    anything: simulated.
    """
    from coda_fast import report

    listed = report.find_images

    def and_gone(paths, limit):
        found = listed(paths, limit)
        (place / "a.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(report, "find_images", and_gone)
    options = (
        "--checkpoint",
        place / "net.safetensors",
        "--methods",
        "none",
        "--output",
        tmp_path / "page.html",
    )
    assert run(capsys, "report", place, *options)[0] == 0
    assert "a.png: no such file" in (tmp_path / "page.html").read_text()
    opened = safety.os.open

    def denied(path, *arguments, **more):
        if str(path).endswith("secret.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(safety.os, "open", denied)
    Image.new("L", (8, 8), 9).save(place / "secret.png")
    assert run(capsys, "report", place, *options)[0] == 0
    assert "secret.png: cannot be read: Permission denied" in (tmp_path / "page.html").read_text()
    line = refused(
        capsys,
        "explain",
        place / "secret.png",
        "--checkpoint",
        place / "net.safetensors",
        "--output",
        tmp_path / "out",
    )
    assert line.endswith("secret.png: cannot be read: Permission denied")


@posix
def test_names_that_move_the_cursor_or_are_no_text(place, tmp_path, capsys):
    names = [os.fsdecode(b"\xff.png"), "\x1b[2Jx.png"]
    for name in names:
        Image.new("L", (8, 8), 90).save(tmp_path / name)
        (place / name).write_bytes(b"nothing")
    options = ("--checkpoint", place / "net.safetensors", "--output")
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in ("explain", *(tmp_path / n for n in names), *options, tmp_path / "out")])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "\\udcff.png: class" in printed
    assert "\\x1b[2Jx.png: class" in printed
    assert run(capsys, "report", place, "--methods", "none", *options, tmp_path / "page.html")[0] == 0
    assert "\\udcff.png: not an image" in (text := (tmp_path / "page.html").read_text())
    assert "\x1b" not in text


# -- sizes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["explain", "report"])
def test_a_strip_is_not_enlarged_to_a_huge_one(place, tmp_path, capsys, command):
    Image.new("L", (20000, 1), 90).save(tmp_path / "strip.png")
    options = ("--checkpoint", place / "net.safetensors", "--output", tmp_path / "out")
    line = refused(capsys, command, tmp_path / "strip.png", *options, "--size", 8)
    assert (
        "strip.png: expected an image at most 256 times as long as wide to enlarge its shorter side to 8 "
        "pixels, got 20000 x 1" in line
    )
    assert not (tmp_path / "out").exists()
    # of which the network sees the middle
    assert run(capsys, command, tmp_path / "strip.png", *options)[0] == 0


@pytest.mark.parametrize("command", ["explain", "report"])
def test_what_the_machine_cannot_hold_is_refused_before_any_work(
    place, tmp_path, capsys, monkeypatch, command
):
    """An explanation of 300 x 200 pixels takes some MiB; of a machine with 8 it is too much, and that of 8
    x 8 is not.
    """
    Image.new("L", (300, 200), 90).save(tmp_path / "large.png")
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 8 << 20)
    options = ("--checkpoint", place / "net.safetensors", "--size", 0, "--output", tmp_path / "out")
    line = refused(capsys, command, place / "a.png", tmp_path / "large.png", *options)
    assert (
        "large.png: an explanation of 300 x 200 pixels: expected what fits into the 0.00781 GiB of this "
        "machine, got what needs" in line
    )
    assert not (tmp_path / "out").exists()
    assert run(capsys, command, place / "a.png", *options)[0] == 0


def test_the_estimate_of_an_explanation(monkeypatch):
    """It is the memory that an explanation takes: within a factor of two of what torch allocates at most
    at a time.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    model = coda_fast.create_model("coda_s_cifar10").eval()
    images = torch.rand(1, 3, 160, 160)

    class Peak(TorchDispatchMode):
        """The sum of storages that are alive, after every operation."""

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
    estimate = safety.explanation_memory(model, 160, 160, 2)
    assert estimate / 2 < watched.peak < 2 * estimate


def test_a_large_picture_is_explained_or_refused_by_a_stated_bound(place, tmp_path, capsys, monkeypatch):
    """24 megapixels as they are: by this network 11 GiB, of which a small machine says so."""
    Image.new("L", (6000, 4000), 90).save(tmp_path / "photo.png")
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 8 << 30)
    options = ("--checkpoint", place / "net.safetensors", "--size", 0, "--output", tmp_path / "out")
    assert "expected what fits into the 8 GiB of this machine" in refused(
        capsys, "explain", tmp_path / "photo.png", *options
    )
    model = coda_fast.load(place / "net.safetensors")
    safety.check_explainable(model, 1200, 1600, "photo", 2)  # but one of 2 megapixels is no question


def test_batches_shrink_with_the_size_of_images():
    model = coda_fast.create_model("coda_xs_digits")
    assert safety.batch_within(model, 8, 8, 256) == 256
    assert safety.batch_within(model, 20_000, 20_000, 256) == 1
    some = safety.batch_within(model, 400, 400, 256)
    assert 1 < some < 256
    assert some * safety.explanation_memory(model, 400, 400) <= 1 << 30


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
def test_options_that_size_memory(place, tmp_path, capsys, arguments, message):
    pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    options = (
        "--checkpoint",
        place / "net.safetensors",
        "--data",
        "digits",
        "--limit",
        8,
        "--output",
        tmp_path / "out",
    )
    assert message in refused(capsys, "evaluate", *options, *arguments)
    assert not (tmp_path / "out").exists()


def test_grids_and_data_that_the_machine_cannot_hold(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 100 << 20)
    options = ("--checkpoint", place / "net.safetensors", "--data", "digits", "--output", tmp_path / "out")
    assert "data: 450 images of 2048 x 2048 pixels: expected what fits" in refused(
        capsys, "evaluate", *options, "--size", 2048
    )
    line = refused(capsys, "evaluate", *options, "--size", 100, "--limit", 40, "--side", 10)
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
    assert arguments[-2] in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line(place, tmp_path, capsys, monkeypatch):
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
        line = refused(
            capsys,
            "explain",
            place / "a.png",
            "--checkpoint",
            place / "net.safetensors",
            "--output",
            tmp_path / "out",
        )
        assert line.startswith("coda-fast: not enough memory: ")
    monkeypatch.setattr(coda_fast.CoDANet, "explain", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.main(
            [
                "explain",
                str(place / "a.png"),
                "--checkpoint",
                str(place / "net.safetensors"),
                "--output",
                str(tmp_path / "out"),
            ]
        )


def test_the_limits_of_a_machine():
    """Of the machine, and of a shell that allows less."""
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


# -- arrays
# ------------------------------------------------------------------------------------------------------------


def header(shape, dtype="|u1", payload=b""):
    """An .npy file that claims ``shape``."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + payload


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (header((10**12, 8, 8)), r"images.npy claims 64000000000128 bytes, the file holds 128"),
        (header((2**62, 8, 8)), "claims"),
        (header((4, 8, 8), payload=bytes(100)), "claims 384 bytes, the file holds 228"),
        (header((4, 8, 8), "<U99999999"), "claims"),
        (header((4,), "|O"), "Object arrays cannot be loaded"),
        (b"", "images: expected an array, got other bytes"),
    ],
)
def test_arrays_that_claim_another_size(place, tmp_path, capsys, images, message):
    path = archive(tmp_path / "x.npz", images=images, labels=header((4,), "<i8", bytes(32)))
    with pytest.raises(ValueError, match=message):
        safety.read_npz(path)["images"] + 0
    options = ("--checkpoint", place / "net.safetensors", "--output", tmp_path / "out")
    assert "data: " in refused(capsys, "evaluate", "--data", path, *options)
    assert not (tmp_path / "out").exists()


def test_arrays_that_are_compressed_beyond_all_memory(tmp_path, monkeypatch):
    path = archive(
        tmp_path / "x.npz", zipfile.ZIP_DEFLATED, images=header((50_000_000,), payload=bytes(50_000_000))
    )
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 10 << 20)
    with pytest.raises(
        safety.TooLarge,
        match="x.npz: arrays: expected what fits into the .* GiB of this machine, got what needs 0.0466",
    ):
        safety.read_npz(path)


def test_arrays_as_numpy_reads_them(tmp_path):
    arrays = {
        "a": np.arange(6).reshape(2, 3),
        "b": np.array(["x", "y"]),
        "c": np.zeros(0),
        "d": np.float32(3),
        "train_x": np.ones(2),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = safety.read_npz(tmp_path / "x.npz", lambda name: not name.startswith("train_"))
    assert found.keys() == arrays.keys() - {"train_x"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((), np.uint8)}, "expected images"),
        ({"labels": np.array(["a"] * 4)}, "expected labels that are integers from 0 on, got <U1"),
        ({"labels": np.full(4, np.nan)}, "expected labels that are integers from 0 on, got float64 from nan"),
        ({"labels": np.zeros((4, 2), int)}, "expected images"),
        ({"labels": np.full(4, 2**62)}, "labels up to"),
        (
            {"images": np.zeros((4, 0, 8), np.uint8)},
            "expected images [N, H, W, C] uint8 and as many labels, got uint8 [4, 0, 8]",
        ),
    ],
)
def test_arrays_that_are_no_images(place, tmp_path, capsys, changes, message):
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4)} | changes
    np.savez(tmp_path / "x.npz", **arrays)
    options = ("--checkpoint", place / "net.safetensors", "--output", tmp_path / "out", "--metric", "removal")
    assert message in refused(capsys, "evaluate", "--data", tmp_path / "x.npz", *options)


@pytest.mark.parametrize("key", ["test_offset", "test_label", "test_lossless_idx", "test_lossless_rgb"])
@pytest.mark.parametrize(
    "value",
    [np.zeros(()), np.array(["x"]), np.full((2, 2, 2), 10**15), np.full(2, np.inf)],
    ids=["0-d", "text", "3-d", "inf"],
)
def test_jpegs_that_do_not_fit(place, tmp_path, capsys, key, value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    raw = np.frombuffer(buffer.getvalue(), np.uint8)
    arrays = {
        "test_jpeg": np.concatenate([raw, raw]),
        "test_offset": np.arange(3) * len(raw),
        "test_label": np.arange(2),
        "test_lossless_idx": np.array([0]),
        "test_lossless_rgb": np.zeros((1, 8, 8, 3), np.uint8),
    }
    np.savez(tmp_path / "x.npz", **(arrays | {key: value}))
    options = ("--checkpoint", place / "net.safetensors", "--output", tmp_path / "out", "--metric", "removal")
    line = refused(capsys, "evaluate", "--data", tmp_path / "x.npz", *options)
    fit = (
        "expected test_jpeg, test_offset and test_label that fit (and test_lossless_idx with "
        "test_lossless_rgb): expected"
    )
    assert fit in line or (
        key == "test_label" and "expected labels of test that are integers from 0 on, got" in line
    )


# -- a folder of results that is not ours
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "no JSON", "[1]", "\x00"], ids=["deep", "text", "list", "bytes"]
)
def test_a_description_that_is_none(place, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text(content)
    options = (
        "--checkpoint",
        place / "net.safetensors",
        "--data",
        "digits",
        "--limit",
        3,
        "--metric",
        "removal",
        "--points",
        3,
    )
    line = refused(capsys, "evaluate", *options, "--output", tmp_path / "out")
    assert "evaluation.json: expected the description of an evaluation, got another file" in line
    assert (tmp_path / "out" / "evaluation.json").read_text() == content


def test_pieces_that_are_none_are_measured_again(place, tmp_path, capsys):
    options = (
        "--checkpoint",
        place / "net.safetensors",
        "--data",
        "digits",
        "--limit",
        3,
        "--metric",
        "removal",
        "--points",
        3,
    )
    assert run(capsys, "evaluate", *options, "--output", tmp_path / "out")[0] == 0
    (piece,) = (tmp_path / "out").glob("pieces/*/*.npy")
    whole = piece.read_bytes()
    for content in (
        header((10**12, 3), "<f8"),
        header((3, 3), "<f4", bytes(36)),
        header((3, 3), "<f8", bytes(10**6)),
        b"",
        whole[:-1],
    ):
        piece.write_bytes(content)
        assert run(capsys, "evaluate", *options, "--output", tmp_path / "out")[0] == 0
        assert piece.read_bytes() == whole
