"""Commands given pipes, devices, folders, broken links, unreadable files and names that are not text."""

import os
import socket

import pytest
from PIL import Image
from support_safety import needs_pipes, refusal, run, write_inputs

from coda_fast import cli, safety


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path / "in")


def make_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # paths of sockets must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


SPECIAL_FILES = {
    "pipe": os.mkfifo if hasattr(os, "mkfifo") else None,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
}


@needs_pipes
@pytest.mark.parametrize("kind", list(SPECIAL_FILES))
def test_what_is_no_file_is_never_waited_for(inputs, tmp_path, capsys, kind):
    """One line refuses a special file that is given by name. In a folder of images it is skipped and named.
    A folder is read as a folder, whatever its name.
    """
    path = tmp_path / "x.png"
    SPECIAL_FILES[kind](path)
    options = ("--checkpoint", inputs / "net.safetensors", "--output")
    wanted = {
        "loop": "x.png: cannot be read",
        "dangling": "x.png: no such file",
        "folder": "x.png, found none",
    }
    line = refusal(capsys, "explain", path, *options, tmp_path / "out").replace(
        "expected an image file, ", ""
    )
    assert wanted.get(kind, f"x.png: got a {kind}") in line
    data = tmp_path / "data"
    (data / "1").mkdir(parents=True)
    Image.new("L", (8, 8), 90).save(data / "1" / "a.png")
    SPECIAL_FILES[kind](data / "1" / "x.png")
    code, _ = run(capsys, "report", data, "--methods", "none", *options, tmp_path / "page.html")
    assert code == 0
    text = (tmp_path / "page.html").read_text()
    if kind != "folder":  # a report shows the images in a folder
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
        line = refusal(
            capsys, "evaluate", "--data", path.rename(tmp_path / "x.npz"), *options, tmp_path / "more"
        )
        assert "x.npz" in line


@needs_pipes
def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    """The pipe replaces the file after it was checked and before it is opened."""
    (tmp_path / "a").touch()
    regular = os.stat(tmp_path / "a")
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(safety.os, "stat", lambda path: regular)
    with pytest.raises(safety.NotAFile, match="x: expected a file, got a pipe"):
        safety.open_file(tmp_path / "x")


def test_an_image_that_vanishes_or_may_not_be_read(inputs, tmp_path, capsys, monkeypatch):
    """An image that disappears after it was listed, or that may not be read, is named, and the others are
    shown. Missing permissions are simulated, because root may read everything.
    """
    from coda_fast import report

    listed = report.find_images

    def list_and_delete_one(paths, limit):
        found = listed(paths, limit)
        (inputs / "a.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(report, "find_images", list_and_delete_one)
    options = (
        "--checkpoint",
        inputs / "net.safetensors",
        "--methods",
        "none",
        "--output",
        tmp_path / "page.html",
    )
    assert run(capsys, "report", inputs, *options)[0] == 0
    assert "a.png: no such file" in (tmp_path / "page.html").read_text()
    opened = safety.os.open

    def denied(path, *arguments, **more):
        if str(path).endswith("secret.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(safety.os, "open", denied)
    Image.new("L", (8, 8), 9).save(inputs / "secret.png")
    assert run(capsys, "report", inputs, *options)[0] == 0
    assert "secret.png: cannot be read: Permission denied" in (tmp_path / "page.html").read_text()
    line = refusal(
        capsys,
        "explain",
        inputs / "secret.png",
        "--checkpoint",
        inputs / "net.safetensors",
        "--output",
        tmp_path / "out",
    )
    assert line.endswith("secret.png: cannot be read: Permission denied")


@needs_pipes
def test_names_that_move_the_cursor_or_are_no_text(inputs, tmp_path, capsys):
    names = [os.fsdecode(b"\xff.png"), "\x1b[2Jx.png"]
    for name in names:
        Image.new("L", (8, 8), 90).save(tmp_path / name)
        (inputs / name).write_bytes(b"nothing")
    options = ("--checkpoint", inputs / "net.safetensors", "--output")
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in ("explain", *(tmp_path / n for n in names), *options, tmp_path / "out")])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "\\udcff.png: fits none of the " in printed
    assert "\\x1b[2Jx.png: fits none of the " in printed
    assert run(capsys, "report", inputs, "--methods", "none", *options, tmp_path / "page.html")[0] == 0
    assert "\\udcff.png: not an image" in (text := (tmp_path / "page.html").read_text())
    assert "\x1b" not in text
