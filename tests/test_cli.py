"""The command line as its users see it: what it prints, writes, and refuses."""

import json
import re
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
import torch
from odd_pictures import turned
from PIL import Image

import coda_fast
from coda_fast import cli, explain_files, plot
from coda_fast.data.photographs import example_photographs
from coda_fast.demo import TEMPERATURES, photographs
from coda_fast.demo.photographs import SHOWN
from coda_fast.viewer import verdict


def run(*arguments):
    """Run the command line, and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return stop.value.code or 0


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    coda_fast.save(
        coda_fast.create_model("coda_xs_digits", class_names=[f"digit {i}" for i in range(10)]), path
    )
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)).save(path)
    return path


def test_explain(checkpoint, image, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    assert run("explain", image, "--checkpoint", checkpoint, "--output", output) == 0
    assert [p.name for p in output.iterdir()] == ["scan_explained.png"]
    Image.open(output / "scan_explained.png").verify()
    printed = capsys.readouterr().out
    # an untrained network gives every class a probability of about 10 %
    assert "scan.png: fits none of the 10 classes: the most likely, digit " in printed
    assert ", explained by " + checkpoint.name in printed
    assert "completeness error" in printed


def test_explain_with_the_networks_of_the_package(tmp_path, capsys):
    """Without a checkpoint the size of a picture decides, and the line says which network it was. A name is
    as good as a file.
    """
    small, large = tmp_path / "small.png", example_photographs()[0].path
    with Image.open(large) as photograph:
        photograph.resize((32, 32)).save(small)
    assert run("explain", small, large, "--output", tmp_path) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition("explained by ")[2].partition(",")[0] for line in printed] == [
        "coda_xs_cifar10",
        "coda_xs_imagenette",
    ]
    for line, path, name in zip(
        printed, (small, large), ("coda_xs_cifar10", "coda_xs_imagenette"), strict=True
    ):
        model = coda_fast.create_model(name, pretrained=True).eval()
        with torch.no_grad():
            logits = model(model.transform(path)[None])[0]
        assert f": {verdict(logits, model.class_names, name)}, completeness" in line
    named = "--checkpoint", "coda_xs_cifar10", "--target", "cat"
    assert run("explain", large, *named, "--output", tmp_path / "cat") == 0
    assert "explained by coda_xs_cifar10" in capsys.readouterr().out
    assert run("explain", large, "--target", "dog", "--output", tmp_path / "dog") == 2
    _one_line(capsys, "--target: expected a class (tench, English springer, ")
    assert not (tmp_path / "dog").exists()


def test_explain_several_with_targets(checkpoint, image, tmp_path, capsys):
    second = tmp_path / "other.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(second)
    options = (
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path,
        "--target",
        "digit 3",
        "--target",
        7,
        "--size",
        0,
    )
    assert run("explain", image, second, *options) == 0
    assert (tmp_path / "scan_explained.png").exists()
    assert (tmp_path / "other_explained.png").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "10"], "--target: expected a class from 0 to 9, got 10"),
        (["--target", "cat"], "--target: expected a class (digit 0, digit 1"),
        (["--device", "warp"], "--device: 'warp' cannot be used here"),
        (["--size", "-1"], "--size"),
        (["--size", "100000"], "--size"),
        (["--checkpoint", "."], "expected a file, got a folder"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors: no such checkpoint"),
        (["missing.png"], "missing.png: no such file"),
        (["--colour"], "No such option"),
    ],
    ids=str,
)
def test_explain_refuses(checkpoint, image, tmp_path, capsys, options, message):
    output = tmp_path / "out"
    before = {p.name for p in tmp_path.iterdir()}
    assert run("explain", image, "--checkpoint", checkpoint, "--output", output, *options) == 2
    _one_line(capsys, message)
    assert {p.name for p in tmp_path.iterdir()} == before, "nothing may be written"


@pytest.mark.parametrize("kind", ["text", "truncated", "nan"])
def test_explain_refuses_images(checkpoint, image, tmp_path, capsys, kind):
    """If one of several images is bad, nothing is written for any of them."""
    bad = tmp_path / "bad.tif"
    if kind == "text":
        bad.write_text("not an image")
    elif kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(bad)
        bad.write_bytes(bad.read_bytes()[:1000])
    else:
        Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(bad)
    assert run("explain", image, bad, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    _one_line(capsys, "bad.tif: ")
    assert not (tmp_path / "out").exists()


def test_explain_draws_over_the_picture_that_was_given(checkpoint, tmp_path):
    """The figure shows the picture to the last pixel, however it is stored. It is as wide as the picture and
    not as its crop, unless --size takes the whole picture.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (24, 60, 3), dtype=np.uint8)
    names = [f"{i}.png" for i in range(1, 9)]
    for i, name in enumerate(names, 1):
        (tmp_path / name).write_bytes(turned(i, "PNG", pixels=pixels))
    assert (
        run(
            "explain",
            *(tmp_path / name for name in names),
            "--checkpoint",
            checkpoint,
            "--output",
            tmp_path / "a",
        )
        == 0
    )
    figures = [np.asarray(Image.open(tmp_path / "a" / f"{i}_explained.png")) for i in range(1, 9)]
    assert all(np.array_equal(figure, figures[0]) for figure in figures)
    assert (
        run(
            "explain", tmp_path / "6.png", "--checkpoint", checkpoint, "--output", tmp_path / "b", "--size", 8
        )
        == 0
    )
    whole = np.asarray(Image.open(tmp_path / "b" / "6_explained.png"))
    assert whole.shape == figures[0].shape
    assert not np.array_equal(whole, figures[0])


def test_explain_a_folder(checkpoint, tmp_path, capsys):
    """All images in the folder and its subfolders are explained, into folders of the same names. Hidden files
    are ignored, and unreadable files are named.
    """
    for name in ("a.png", "sub/a.png", "sub/deeper/b.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(
            tmp_path / "set" / name
        )
    (tmp_path / "set" / "._a.png").write_bytes(b"of macOS")
    (tmp_path / "set" / "sub" / "broken.png").write_bytes(b"nothing")
    assert run("explain", tmp_path / "set", "--checkpoint", checkpoint, "--output", tmp_path / "out") == 0
    written = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert written == ["a_explained.png", "sub/a_explained.png", "sub/deeper/b_explained.png"]
    printed = capsys.readouterr()
    assert "broken.png: not an image" in printed.err
    assert len(printed.out.splitlines()) == 3
    (tmp_path / "empty").mkdir()
    assert run("explain", tmp_path / "empty", "--checkpoint", checkpoint, "--output", tmp_path / "none") == 2
    _one_line(capsys, "IMAGES: expected pictures in")
    (tmp_path / "empty" / "broken.png").write_bytes(b"nothing")
    assert run("explain", tmp_path / "empty", "--checkpoint", checkpoint, "--output", tmp_path / "none") == 2
    assert "expected at least one image that can be read, got 1 files" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (1, 7), (6, 1), (5000, 1), (3, 2)])
def test_explain_and_report_specks_and_strips(checkpoint, tmp_path, size):
    """Even a crop of less than one pixel of the picture is shown."""
    model = coda_fast.load(checkpoint, preprocessing=dict(resize=20, crop=16))
    coda_fast.save(model, tmp_path / "cropping.safetensors")
    Image.new("L", size, 99).save(tmp_path / "speck.png")
    common = (tmp_path / "speck.png", "--checkpoint", tmp_path / "cropping.safetensors", "--output")
    assert run("explain", *common, tmp_path) == 0
    assert run("report", *common, tmp_path / "page.html", "--methods", "none") == 0


def test_explain_a_folder_with_names_that_differ_in_their_endings(checkpoint, tmp_path, capsys):
    for name in ("a.png", "a.bmp", "b.png"):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 9).save(tmp_path / "set" / name)
    assert run("explain", tmp_path / "set", "--checkpoint", checkpoint, "--output", tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.bmp_explained.png",
        "a.png_explained.png",
        "b_explained.png",
    ]
    capsys.readouterr()
    assert (
        run("explain", tmp_path / "set", "--checkpoint", checkpoint, "--output", tmp_path / "set" / "out")
        == 2
    )
    _one_line(capsys, "output: expected a folder outside of")


def test_explain_passes_over_what_is_gone_when_its_turn_comes(checkpoint, tmp_path, capsys, monkeypatch):
    """An image of a folder that has disappeared is named, and the others are explained. A strip that is too
    long is named, too.
    """
    (tmp_path / "set").mkdir()
    for name in "abc":
        Image.new("L", (8, 8), 9).save(tmp_path / "set" / f"{name}.png")
    Image.new("L", (3000, 1)).save(tmp_path / "set" / "strip.png")
    draw = explain_files.explain_picture

    def delete_and_draw(model, path, *rest):
        (tmp_path / "set" / "b.png").unlink(missing_ok=True)
        return draw(model, path, *rest)

    monkeypatch.setattr(explain_files, "explain_picture", delete_and_draw)
    assert (
        run(
            "explain", tmp_path / "set", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--size", 8
        )
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_explained.png", "c_explained.png"]
    printed = capsys.readouterr().err
    assert "skipped" in printed
    assert "b.png: no such file" in printed
    assert "strip.png: expected an image at most 256 times as long as wide" in printed


def test_explain_keeps_no_picture(checkpoint, tmp_path, monkeypatch):
    """Only one image of a set is in memory at a time: each figure is written before the next is drawn."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(folder / f"{i}.png")
    drawn, render = [], plot.render

    def counting(figure):
        drawn.append(len(list((tmp_path / "out").glob("*.png"))))
        return render(figure)

    monkeypatch.setattr(plot, "render", counting)
    assert run("explain", folder, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 0
    assert drawn == [0, 1, 2, 3]


def test_explain_refuses_equal_names(checkpoint, image, tmp_path, capsys):
    twin = tmp_path / "sub" / "scan.png"
    twin.parent.mkdir()
    twin.write_bytes(image.read_bytes())
    assert run("explain", image, twin, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    _one_line(capsys, "several images would be written to")


def test_explain_refuses_foreign_checkpoints(image, tmp_path, capsys):
    assert run("explain", image, "--checkpoint", image) == 2
    _one_line(capsys, "scan.png: not a safetensors file")


def test_explain_refuses_networks_that_diverged(checkpoint, image, tmp_path, capsys):
    model = coda_fast.load(checkpoint)
    with torch.no_grad():
        model.layers[0].weight.fill_(float("nan"))
    coda_fast.save(model, checkpoint)
    assert run("explain", image, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    _one_line(capsys, "logits that are not finite")
    assert not (tmp_path / "out").exists()


def test_explain_a_strip(checkpoint, tmp_path):
    strip = tmp_path / "strip.png"
    Image.fromarray(np.zeros((600, 2), np.uint8)).save(strip)
    assert run("explain", strip, "--checkpoint", checkpoint, "--output", tmp_path, "--size", 0) == 0
    with Image.open(tmp_path / "strip_explained.png") as figure:
        assert max(figure.size) < 3000


def test_explain_when_the_folder_is_a_file(checkpoint, image, capsys):
    assert run("explain", image, "--checkpoint", checkpoint, "--output", image) == 2
    _one_line(capsys, "scan.png")


def test_info(capsys):
    assert run("info") == 0
    printed = capsys.readouterr().out
    for word in (coda_fast.__version__, torch.__version__, "factored", "reference", "triton"):
        assert word in printed


def test_version_and_usage(capsys):
    assert run("--version") == 0
    assert coda_fast.__version__ in capsys.readouterr().out
    assert run("nonsense") == 2
    _one_line(capsys, "No such command 'nonsense'")


def test_without_click():
    """Without the extra, one line says what to install."""
    code = "import sys; sys.modules['click'] = None; from coda_fast import cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == "coda-fast: the command line needs click: pip install 'coda-fast[cli]'"


def test_demo(tmp_path, capsys):
    """After two epochs every file exists, the numbers are those that were printed, and the checkpoint can
    explain.
    """
    assert run("demo", "--train", "--epochs", 2, "--output", tmp_path / "demo") == 0
    files = {p.name for p in (tmp_path / "demo").iterdir()}
    assert files == {"coda_demo.png", "coda_demo.safetensors", "coda_demo.json"}
    numbers = json.loads((tmp_path / "demo" / "coda_demo.json").read_text())
    assert [row["temperature"] for row in numbers["results"]] == list(TEMPERATURES)
    printed = capsys.readouterr().out
    for row in numbers["results"]:
        assert f"{row['accuracy']:.1%}" in printed
        assert row["accuracy"] > 0.5, "the accuracy after two epochs shows that it learns"
        assert row["relative_completeness_error"] < 1e-5
    model = coda_fast.load(tmp_path / "demo" / "coda_demo.safetensors")
    assert model.temperature == TEMPERATURES[-1]
    assert (
        coda_fast.checkpoints.read_metadata(tmp_path / "demo" / "coda_demo.safetensors")["accuracy"]
        == numbers["results"][-1]["accuracy"]
    )
    with Image.open(tmp_path / "demo" / "coda_demo.png") as figure:
        assert min(figure.size) > 1000


def test_demo_of_photographs(tmp_path, capsys):
    """Without --train nothing is trained: a line about each example photograph, and the figure."""
    assert run("demo", "--output", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(SHOWN) >= 4
    for (file, network), line in zip(SHOWN.items(), lines, strict=False):
        assert line.startswith(f"{file}: ")
        assert f"explained by {network}, completeness error " in line
    assert [path.name for path in tmp_path.iterdir()] == ["coda_demo.png"]
    with Image.open(tmp_path / "coda_demo.png") as figure:
        assert min(figure.size) > 1000
    assert run("demo", "--epochs", 3, "--output", tmp_path / "other") == 2
    _one_line(capsys, "--epochs: expected --train beside it")
    assert not (tmp_path / "other").exists()


def test_demo_needs_a_folder(tmp_path, capsys):
    """Said before anything is computed."""
    (tmp_path / "file").write_text("mine")
    for train in ([], ["--train", "--epochs", 1]):
        assert run("demo", *train, "--output", tmp_path / "file") == 2
        _one_line(capsys, f"output: expected a folder at {tmp_path / 'file'}, got a file: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_names_the_file_that_was_asked_for(checkpoint, image, tmp_path, capsys, monkeypatch):
    """Not the temporary one beside it, which it will replace."""

    def refused(dir, prefix, suffix):
        raise PermissionError(13, "Permission denied", str(dir / f"{prefix}abc{suffix}"))

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    output = tmp_path / "page.html"
    assert run("report", image, "--checkpoint", checkpoint, "--output", output, "--methods", "none") == 2
    _one_line(capsys, f"coda-fast: {output}: Permission denied")


def test_demo_without_photographs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photographs, "example_photographs", list)
    assert run("demo", "--output", tmp_path / "demo") == 2
    _one_line(capsys, "the demo needs the photographs of scikit-learn: pip install 'coda-fast[cli]'")
    assert not (tmp_path / "demo").exists()


def test_demo_without_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("demo", "--train", "--output", tmp_path / "demo") == 2
    _one_line(capsys, "scikit-learn: pip install 'coda-fast[cli]'")
    assert not (tmp_path / "demo").exists()


def _one_line(capsys, message):
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in error


def test_pixels_out_of_range_are_one_line(checkpoint, image, tmp_path, capsys, monkeypatch):
    """The warning is printed once for all images, and without the line of code that caused it. Pixels of
    files are in [0, 1], so that only a wrong reader can cause it.
    """
    read = explain_files.as_network_sees
    monkeypatch.setattr(explain_files, "as_network_sees", lambda *args: 255 * read(*args))
    monkeypatch.setattr(coda_fast.explain, "_WARNED", threading.Event())
    other = tmp_path / "other.png"
    other.write_bytes(image.read_bytes())
    assert run("explain", image, other, "--checkpoint", checkpoint, "--size", 0, "--output", tmp_path) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("coda-fast: warning: images: expected pixels in [0, 1]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "nobody: no such checkpoint, and no network of that name"),
        (["coda_s_cifar10", "--arch", "70"], "arch: expected one of 80, .*, gfx942, got 70"),
        (
            ["coda_s_cifar10", "--dtype", "float64"],
            "'float64' is not one of 'bfloat16', 'float16', 'float32'",
        ),
    ],
)
def test_compile_refuses(arguments, message, capsys):
    assert run("compile", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_compile(checkpoint, capsys, monkeypatch):
    """The network of a checkpoint is compiled for its own image size or another one, channels last."""
    asked = []
    monkeypatch.setattr(
        coda_fast, "compile_kernels", lambda net, *args, **options: asked.append((args, options)) or 3
    )
    assert (
        run("compile", checkpoint, "--arch", "gfx942", "--workers", "2", "--size", "24", "--dtype", "float16")
        == 0
    )
    assert run("compile", checkpoint, "--arch", "90") == 0
    (shape, dtype), options = asked[0]
    assert (shape, dtype, options["arch"], options["workers"]) == (
        (16, 1, 24, 24),
        torch.float16,
        "gfx942",
        2,
    )
    assert options["memory_format"] == torch.channels_last
    assert asked[1][0] == ((16, 1, 8, 8), torch.bfloat16)
    assert asked[1][1]["arch"] == 90
    assert "3 kernels of" in capsys.readouterr().out
