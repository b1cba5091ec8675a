"""``coda-fast evaluate`` as a user types it, on a network that has learnt to classify digits."""

import json

import pytest
import torch
from click.testing import CliRunner

import coda_fast
from coda_fast import demo
from coda_fast.cli import cli

pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    data = demo.digits()
    torch.manual_seed(0)
    model = coda_fast.create_model("coda_xs_digits", temperature=40, class_names=data.class_names)
    demo.train(model, data, epochs=8)
    path = tmp_path_factory.mktemp("model") / "digits.safetensors"
    coda_fast.save(model, path)
    return path


def run(checkpoint, output, *options):
    arguments = ["evaluate", "--checkpoint", checkpoint, "--data", "digits", "--output", output, *options]
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_localisation(checkpoint, tmp_path):
    """The network's own maps localise the digits better than the gradient. A second run only reads the stored
    results.
    """
    options = ("--methods", "Ours, Grad", "--side", 2, "--grids", 30)
    done = run(checkpoint, tmp_path, *options)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert 0 < document["completeness_error"]["worst"] < 1e-6
    ours, gradient = document["methods"]["Ours"], document["methods"]["Grad"]
    assert ours["mean"] > gradient["mean"] > 0
    assert ours["mean"] > 0.5 > ours["chance"] == 0.25
    assert f"| Ours | {ours['mean']:.4f} | " in done.output
    assert f"{ours['grids']} grids of 2 x 2, chance 0.250" in done.output
    assert {p.name for p in tmp_path.iterdir()} == {
        "evaluation.json", "pieces", "results.json", "results.csv", "localisation.png", "localisation.svg",
    }  # fmt: skip
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("pieces/*/*.npy")}
    assert run(checkpoint, tmp_path, *options).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("pieces/*/*.npy")} == stamps
    assert json.loads((tmp_path / "results.json").read_text()) == document


def test_removal(checkpoint, tmp_path):
    done = run(checkpoint, tmp_path, "--metric", "removal", "--limit", 40)
    assert done.exit_code == 0, done.output
    ours = json.loads((tmp_path / "results.json").read_text())["methods"]["Ours"]
    assert ours["images"] == 40
    assert 0.5 < ours["start"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "Magic"), "method: expected one of Ours, Occ5"),
        (("--metric", "beauty"), "'beauty' is not one of 'localisation', 'removal'"),
        (
            ("--data", "nowhere"),
            "data: expected 'digits', an .npz file or a folder of classes, got 'nowhere'",
        ),
        (
            ("--set", "Occ5.size=3"),
            "--set: expected METHOD.NAME=NUMBER with a method among Ours, got 'Occ5.size=3'",
        ),
        (
            ("--methods", "Occ5", "--set", "Occ5.edge=3"),
            "Occ5: expected settings among size, stride, batch_size, got edge",
        ),
        (("--side", 4), "a grid needs confident, correctly classified images of at least 16 classes, got 10"),
    ],
)
def test_bad_input(checkpoint, tmp_path, options, message):
    done = run(checkpoint, tmp_path / "out", *options)
    assert message in done.output + str(done.exception)
    assert not (tmp_path / "out").exists()


def test_settings_and_twins(checkpoint, tmp_path):
    """IxG and DeepLIFT are the same method on a CoDA-Net and are shown once. Settings of methods are stored
    with the result.
    """
    options = [
        "--metric",
        "removal",
        "--limit",
        3,
        "--points",
        5,
        "--order",
        "most",
        "--fraction",
        1,
        "--insert",
    ]
    done = run(checkpoint, tmp_path, *options, "--methods", "IxG,DeepLIFT,Occ5", "--set", "Occ5.size=3")
    assert done.exit_code == 0, done.output
    assert "DeepLIFT is left out: on a CoDA-Net it is IxG, to rounding" in done.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert list(document["methods"]) == ["IxG", "Occ5"]
    assert document["methods"]["Occ5"]["settings"]["size"] == 3
    assert (document["settings"]["insert"], document["settings"]["fraction"], document["skipped"]) == (
        True,
        1,
        0,
    )
    # from no pixel to all pixels
    assert document["methods"]["IxG"]["start"] < document["methods"]["IxG"]["end"]


def test_a_folder_of_another_evaluation(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path, "--metric", "removal", "--limit", 5).exit_code == 0
    before = (tmp_path / "results.json").read_text()
    done = run(checkpoint, tmp_path, "--metric", "removal", "--limit", 6)
    assert "holds another evaluation" in str(done.exception)
    assert (tmp_path / "results.json").read_text() == before
