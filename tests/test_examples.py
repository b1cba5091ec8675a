"""The scripts in examples/, started as their first lines say, on a small network and for a short time.

The example that reads an ONNX file is tested in ``export/test_export_command.py``.
"""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, environment

import coda_fast
from coda_fast import demo

Image = pytest.importorskip("PIL.Image", reason="needs the extra coda-fast[cli]")
EXAMPLES = ROOT / "examples"
LONGEST = 59  # lines, so that an example fits on one screen


def command(name, *arguments):
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]


def output_of(name, *arguments, cwd):
    done = subprocess.run(
        command(name, *arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data():
    return demo.digits()


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A network that knows the digits well enough to build grids of confidently classified images."""
    torch.manual_seed(0)
    model = coda_fast.create_model("coda_xs_digits", temperature=40, class_names=data.class_names)
    demo.train(model, data, epochs=5)
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    coda_fast.save(model, path)
    return path


@pytest.fixture
def picture(data, tmp_path):
    path = tmp_path / "digit.png"
    save_image(data.test_images[0], path)
    return path


def save_image(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(path)


def test_every_example_is_short_and_tested():
    scripts = sorted(EXAMPLES.glob("*.py"))
    tests = Path(__file__).read_text() + (ROOT / "tests" / "export" / "test_export_command.py").read_text()
    assert len(scripts) >= 5
    for script in scripts:
        assert len(script.read_text().splitlines()) <= LONGEST, script.name
        assert script.stem in tests, script.name


def test_explain_picture(checkpoint, picture, tmp_path):
    text = output_of("explain_picture", picture, "--checkpoint", checkpoint, cwd=tmp_path)
    model = coda_fast.load(checkpoint).eval()
    logits = model(model.transform(picture)[None])[0].detach()
    found = re.findall(r"^(\S+) +logit (\S+) +map \+ bias (\S+)", text, re.MULTILINE)
    assert [name for name, _, _ in found] == [f"{c}" for c in logits.topk(2).indices.tolist()]
    for name, logit, total in found:
        assert float(logit) == pytest.approx(float(logits[int(name)]), abs=2e-5)
        assert float(total) == pytest.approx(float(logit), abs=2e-5)
    assert np.asarray(Image.open(tmp_path / "why.png")).std() > 0


def test_replace_convolutions(tmp_path):
    text = output_of("replace_convolutions", cwd=tmp_path)
    assert "20 convolutions are DAU layers now, 0 are kept" in text
    assert float(re.search(r"loss of a training step: (\S+)", text)[1]) > 0
    assert float(re.search(r"relative error (\S+)", text)[1]) < 1e-10


def test_train_on_folder(data, tmp_path):
    """The run finishes, and its network has the classes of the folder."""
    for part, images, labels in (
        ("train", data.train_images[:200], data.train_labels),
        ("val", data.test_images[:100], data.test_labels),
    ):
        for index, image in enumerate(images):
            if (name := {0: "zero", 1: "one"}.get(int(labels[index]))) is not None:
                save_image(image, tmp_path / "pictures" / part / name / f"{index}.png")
    arguments = ["--size", 8, "--epochs", 2, "--output", "run", "batch_size=8", "data.workers=0"]
    text = output_of("train_on_folder", "pictures", *arguments, "accelerator=cpu", "log.maps=0", cwd=tmp_path)
    assert "run/model.safetensors" in text
    assert coda_fast.load(tmp_path / "run" / "model.safetensors").class_names == ["one", "zero"]


def test_compare_methods(checkpoint, tmp_path):
    pytest.importorskip("captum", reason="needs the extra coda-fast[evaluation]")
    text = output_of("compare_methods", "--checkpoint", checkpoint, "--grids", 8, "--images", 8, cwd=tmp_path)
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in text.splitlines()[1:]}
    assert set(rows) == {"Ours", "IxG", "IntGrad", "GCam", "Grad"}
    assert all(0 <= value <= 1 for values in rows.values() for value in values)
    assert rows["Ours"][0] > max(0.25, rows["Grad"][0]), (
        "the network's own maps should localise better than the gradient"
    )


def test_serve(checkpoint, picture, tmp_path):
    server = subprocess.Popen(
        command("serve", "--checkpoint", checkpoint, "--port", 0),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, data=picture.read_bytes(), timeout=60) as answer:
            said = json.load(answer)
        model = coda_fast.load(checkpoint).eval()
        logits = model(model.transform(picture)[None])[0].detach()
        assert said["class"] == str(int(logits.argmax()))
        assert said["logit"] == pytest.approx(float(logits.max()), abs=1e-5)
        assert np.sum(said["contribution_map"]) + said["bias"] == pytest.approx(said["logit"], abs=1e-5)
        for broken in (b"no picture", b""):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address, data=broken, timeout=60)
            assert refused.value.code == 400
            assert "error" in json.load(refused.value)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
