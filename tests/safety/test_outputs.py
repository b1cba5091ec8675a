"""Commands never write over their inputs, nor over files that are not results."""

import os

import pytest
from PIL import Image
from support_safety import contents, npy, refusal, removal_of_digits, run, write_inputs

from coda_fast import safety


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path / "in")


def other_names(path, tmp_path):
    """Paths to the same file: its own, other spellings, links to it, and a link to its folder."""
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
def test_a_report_is_never_written_over_its_inputs(inputs, tmp_path, capsys, victim, images):
    before = contents(inputs)
    for output in other_names(inputs / victim, tmp_path):
        arguments = [inputs / name for name in images]
        line = refusal(
            capsys, "report", *arguments, "--checkpoint", inputs / "net.safetensors", "--output", output
        )
        assert "output: expected another file than those that are read, got" in line
        assert victim in line
    assert contents(inputs) == before


def test_a_report_beyond_the_limit_of_a_folder_is_an_input_too(inputs, capsys):
    for i in range(5):
        Image.new("L", (8, 8), i).save(inputs / f"b{i}.png")
    before = contents(inputs)
    for name in before:
        if name.suffix == ".png":
            options = ("--checkpoint", inputs / "net.safetensors", "--limit", 1, "--output", name)
            assert "expected another file" in refusal(capsys, "report", inputs, *options)
    assert contents(inputs) == before


def test_a_report_may_be_written_again_and_beside_its_images(inputs, capsys):
    options = (
        "--checkpoint",
        inputs / "net.safetensors",
        "--methods",
        "none",
        "--output",
        inputs / "page.html",
    )
    for _ in range(2):
        assert run(capsys, "report", inputs, *options)[0] == 0


@pytest.mark.parametrize("linked", [False, True])
def test_a_figure_is_never_written_over_another_image(inputs, tmp_path, capsys, linked):
    """The figure of a.png would be written to a_explained.png, which is an input too."""
    before, output = contents(inputs), inputs
    if linked:
        output = tmp_path / "out"
        output.mkdir()
        (output / "a_explained.png").symlink_to(inputs / "a_explained.png")
    arguments = (
        "explain",
        inputs / "a.png",
        inputs / "a_explained.png",
        "--checkpoint",
        inputs / "net.safetensors",
        "--output",
        output,
    )
    assert "which is " in (line := refusal(capsys, *arguments))
    assert "a_explained.png" in line
    assert contents(inputs) == before
    # if it is not an input, it is an old figure, and is replaced
    assert run(capsys, *arguments[:2], *arguments[3:])[0] == 0


def test_a_video_is_never_written_over_its_source(inputs, tmp_path, capsys):
    pytest.importorskip("av")
    frames = [Image.new("L", (8, 8), 50 * i) for i in range(3)]
    clip = inputs / "c_explained.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=100)
    os.link(clip, inputs / "c.gif")
    before = contents(inputs)
    assert "expected another file" in refusal(
        capsys, "explain", inputs / "c.gif", "--checkpoint", inputs / "net.safetensors", "--output", inputs
    )
    assert contents(inputs) == before


def test_results_never_go_into_the_data(inputs, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "1").mkdir(parents=True)
    Image.new("L", (8, 8), 90).save(data / "1" / "a.png")
    (tmp_path / "link").symlink_to(data, target_is_directory=True)
    before = contents(tmp_path)
    options = ("--checkpoint", inputs / "net.safetensors", "--metric", "removal", "--points", 3)
    for output in (
        data,
        data / "1",
        data / "new" / "deeper",
        tmp_path / "link" / "out",
        data / "1" / ".." / "x",
    ):
        line = refusal(capsys, "evaluate", "--data", data, *options, "--output", output)
        assert f"output: expected a folder outside of {data}, which is read" in line
    os.link(inputs / "d.npz", inputs / "results.csv")
    before = contents(tmp_path)
    for checkpoint, folder in (
        (inputs / "net.safetensors", inputs),
        (tmp_path / "own" / "results.json", tmp_path / "own"),
    ):
        if folder != inputs:
            folder.mkdir()
            os.link(inputs / "net.safetensors", checkpoint)
            before = contents(tmp_path)
        options = ("--checkpoint", checkpoint, "--metric", "removal", "--points", 3)
        assert "expected another file" in refusal(
            capsys, "evaluate", "--data", inputs / "d.npz", *options, "--output", folder
        )
    assert contents(tmp_path) == before


def test_outputs_that_are_no_files(inputs, tmp_path, capsys):
    """As root, os.replace would replace a device by a file."""
    (tmp_path / "folder.html").mkdir()
    options = ("--checkpoint", inputs / "net.safetensors", "--output")
    assert "expected a file at" in refusal(
        capsys, "report", inputs / "a.png", *options, tmp_path / "folder.html"
    )
    with pytest.raises(ValueError, match="expected a file at /dev/null, got a device"):
        safety.check_outputs([os.devnull], [])
    for command in ("explain", "report"):
        line = refusal(capsys, command, inputs / "a.png", *options, inputs / "a.png" / "sub" / "x")
        assert f"got a file: {inputs / 'a.png'}" in line


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "no JSON", "[1]", "\x00"], ids=["deep", "text", "list", "bytes"]
)
def test_a_description_that_is_none(inputs, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text(content)
    options = removal_of_digits(inputs)
    line = refusal(capsys, "evaluate", *options, "--output", tmp_path / "out")
    assert "evaluation.json: expected the description of an evaluation, got another file" in line
    assert (tmp_path / "out" / "evaluation.json").read_text() == content


def test_pieces_that_are_none_are_measured_again(inputs, tmp_path, capsys):
    options = removal_of_digits(inputs)
    assert run(capsys, "evaluate", *options, "--output", tmp_path / "out")[0] == 0
    (piece,) = (tmp_path / "out").glob("pieces/*/*.npy")
    whole = piece.read_bytes()
    for content in (
        npy((10**12, 3), "<f8"),
        npy((3, 3), "<f4", bytes(36)),
        npy((3, 3), "<f8", bytes(10**6)),
        b"",
        whole[:-1],
    ):
        piece.write_bytes(content)
        assert run(capsys, "evaluate", *options, "--output", tmp_path / "out")[0] == 0
        assert piece.read_bytes() == whole
