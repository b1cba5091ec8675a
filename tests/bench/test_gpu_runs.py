"""Both runs on a GPU, rehearsed from beginning to end on a CPU in a tree without git, and their parts:
stages, training, packing and gathering files.
"""

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import providers, results, verify
from bench.verify import Verdict
from coda_fast import load
from coda_kernels import config
from experiments import fast_training
from tools import gather, gpu_mark, gpu_report, gpu_smoke, gpu_stages, warm

ROOT = Path(__file__).resolve().parent.parent.parent

# The packages of a machine with a GPU (docs/gpu.md), and packages that it lacked although some of the former
# require them
THERE = ("torch", "torchvision", "triton", "lightning", "timm", "safetensors", "tensorboard", "numpy",
         "pytest", "pytest-benchmark",
         "hypothesis", "matplotlib", "pillow", "click", "coda-fast")  # fmt: skip
ABSENT = ("captum", "pydantic", "tqdm", "webdataset")

# Hides packages and their plugins as if they were not installed
SITE = """
import importlib.metadata
from importlib.machinery import PathFinder

BLOCKED, DISTRIBUTIONS = {blocked!r}, {distributions!r}
find, found = PathFinder.find_spec, importlib.metadata.distributions
hidden = lambda name: name.partition(".")[0] in BLOCKED
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if hidden(name) else find(name, path, target)
)
importlib.metadata.distributions = lambda **options: [
    d for d in found(**options) if d.name not in DISTRIBUTIONS
]
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def hide(folder):
    """Write a sitecustomize.py that hides all packages except THERE and their requirements, and all of
    ABSENT.
    """
    from packaging.requirements import Requirement

    known, waiting = set(), list(THERE)
    while waiting:
        name = canonical(waiting.pop())
        if name in known or name in ABSENT:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # not on this platform
            continue
        known.add(name)
        requirements = [Requirement(text) for text in needs]
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    modules = importlib.metadata.packages_distributions().items()
    blocked = {module for module, owners in modules if not known & {canonical(owner) for owner in owners}}
    distributions = {
        d.name for d in importlib.metadata.distributions() if d.name and canonical(d.name) not in known
    }
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(blocked=blocked, distributions=distributions))
    return folder


def test_both_runs_rehearsed_from_a_bare_tree(tmp_path, monkeypatch):
    """With only the folder that ``gather`` packs and the packages of such a machine, every stage finishes,
    none fails, and the results are a few small files. This test is not marked slow, because the oldest
    supported versions are those of such a machine.
    """
    gathered, site = tmp_path / "gathered", hide(tmp_path / "site")
    made_images(tmp_path / "images.npz")
    monkeypatch.setattr(results, "commit", lambda: "rehearsed")
    assert (
        gather.main(["--data", str(tmp_path / "images.npz"), "--no-wheels", "--output", str(gathered)]) == 0
    )
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "CODA_FAST_"))}
    own |= {
        "PYTHONPATH": str(site),
        "PYTHON": sys.executable,
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    lacking = f"import importlib.util as u; print([u.find_spec(name) for name in {ABSENT}])"
    seen = subprocess.run(
        [sys.executable, "-c", lacking], env=own, capture_output=True, text=True, check=True
    ).stdout
    assert seen.strip() == "[None, None, None, None]"
    running = {}
    for name in ("smoke", "report"):
        command = ["bash", str(gathered / "run.sh"), name, str(tmp_path / "results")]
        options = ["--device", "cpu", "--quick", "--jobs", "1", "--minutes", "9"]
        options += ["--output", str(tmp_path / name)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running[name] = subprocess.Popen([*command, *options], cwd=tmp_path, env=own, **pipe)
    texts = {name: process.communicate(timeout=600)[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, texts[name]
    packed = list((tmp_path / "results").iterdir())
    assert {path.name for path in packed} == {"smoke.tar.gz", "report.tar.gz", fast_training.WEIGHTS}
    assert max(path.stat().st_size for path in packed) < gpu_stages.MOST
    smoke = json.loads((tmp_path / "smoke" / "smoke.json").read_text())
    assert smoke["of"]["commit"] == "rehearsed"
    assert set(gpu_smoke.GROUPS) < set(smoke["verdicts"])
    # on the CPU, as requested
    assert {verdict["result"] for verdict in smoke["verdicts"].values()} == {"pass", "none"}
    assert "\npass  golden values: 1 passed\n" in texts["smoke"]
    with tarfile.open(tmp_path / "results" / "report.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"tests.json", "configurations.json", "large.json", "later.json", "training.json"} < names
    assert any(name.endswith(".jsonl") and "logs" not in name for name in names)
    assert Verdict.load(tmp_path / "report" / "tests.json").passed
    rows = results.read(next((tmp_path / "report").glob("*.jsonl")))
    assert {(r["op"], r["mode"]) for r in rows} >= {
        ("S9", "forward"),
        ("S9", "forward + backward"),
        ("coda_s_cifar10", "inference"),
    }
    assert any(r["provider"] == providers.ALGEBRAIC + providers.COMPILED for r in rows)
    assert "| S9 " in texts["report"]
    if not torch.cuda.is_available():  # the report says so instead of passing
        assert Verdict.load(tmp_path / "report" / "large.json").skipped > 0
        configurations = Verdict.load(tmp_path / "report" / "configurations.json")
        assert configurations.skipped > 0
        assert not configurations.passed
    training = json.loads((tmp_path / "report" / "training.json").read_text())
    assert training["data"] == "CIFAR-10 (JPEG)"
    assert not [
        value for value in training["judged"].values() if isinstance(value, dict) and "missing" in value
    ]
    assert load(tmp_path / "results" / fast_training.WEIGHTS).layers[0].weight.dtype == torch.float16
    assert not list((tmp_path / "report").glob("sm_*.json"))


# -- the first run
# ------------------------------------------------------------------------------------------------------------


def test_smoke_covers_every_kernel():
    """The checks of gpu_smoke launch every kernel in every dtype, according to the rules that decide which
    kernels a layer launches.
    """
    import smoke_checks
    from test_gpu import kernels_of, shape_of

    for dtype in smoke_checks.DTYPES:
        launched = set()
        for case, options in smoke_checks.CASES.values():
            launched |= {
                kernel
                for kernel in kernels_of(shape_of(case, dtype))
                if options or not kernel.endswith("_kept")
            }
        assert launched == set(config.kernel_specs())


def test_smoke_finds_its_tests():
    """Each group has tests, and the first group has only those of the kernels."""
    names = verify.collect(*gpu_smoke.FILES)
    groups = {group: [name for name in names if is_of(name)] for group, is_of in gpu_smoke.GROUPS.items()}
    assert all(groups.values())
    assert all("triton" in name for name in groups["golden values"])
    assert sum(map(len, groups.values())) < 150


def test_smoke_tells_what_failed(tmp_path, capsys, monkeypatch):
    """Each verdict is one line, followed by the lines of the error, and the exit status is a failure. A test
    that did not finish has not passed.
    """
    smoke = gpu_smoke.Smoke(tmp_path, "cpu", time.monotonic() + 60)
    error = (
        "E       AssertionError: C 64, n 64, r 64, k 3, stride 1, 8 x 8, batch 4, bfloat16: result 1: "
        "error; worst at (0, 1, 2, 3)"
    )
    name = "tests/kernels/smoke_checks.py::test_kernels[S7-bfloat16]"
    other = "tests/kernels/test_gpu.py::test_same_bits_twice[1]"
    monkeypatch.setattr(verify, "collect", lambda *a, **k: [name, other])
    monkeypatch.setattr(verify, "shards", lambda *a: Verdict(failures=(name,), unfinished=1))
    failed = {"outcome": "failed", "seconds": 1.0, "reason": f"x = 1\n{error}\nwhere"}
    monkeypatch.setattr(verify, "outcomes", lambda folder: {name: failed})
    assert not smoke.run(["tests"])
    text = capsys.readouterr().out
    assert "FAIL  every kernel and dtype: 1 failed\n" in text
    assert "8 x 8, batch 4, bfloat16: result 1: error; worst at (0, 1, 2, 3)" in text
    assert "left  determinism: 1 left" in text
    assert json.loads((tmp_path / "smoke.json").read_text())["verdicts"]["determinism"]["result"] == "left"


def test_a_smoke_stage_that_raises_is_a_verdict(tmp_path, monkeypatch):
    smoke = gpu_smoke.Smoke(tmp_path, "cpu", time.monotonic() + 60)
    monkeypatch.setattr(gpu_smoke.Smoke, "ceilings", lambda self: [][1])
    assert not smoke.run(["ceilings"])
    assert json.loads((tmp_path / "smoke.json").read_text())["verdicts"]["ceilings"]["result"] == "FAIL"


def test_warming_tells_what_failed(monkeypatch):
    """A network that does not compile is named, and the others are compiled."""
    seen = []

    def compile_kernels(model, shape, dtype, workers, **options):
        seen.append((shape, dtype, workers))
        if len(seen) == 1:
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(warm.coda_fast, "compile_kernels", compile_kernels)
    wanted = [("coda_s_cifar10", "bfloat16"), ("coda_s_cifar10", "float32")]
    found = warm.warm(wanted, "cuda", 16)
    assert found == ["failed: coda_s_cifar10 bfloat16: RuntimeError: no such instruction"]
    assert seen[1] == ((16, 3, 32, 32), torch.float32, 16)


# -- the second run
# ------------------------------------------------------------------------------------------------------------


def test_first_tiles():
    tests = [
        f"t::test_shipped_tile[{key} {tile}]"
        for key in ("fold C6 16bit", "fold C6 32bit")
        for tile in ("BM128 w8 s3", "BM64 w4 s2")
    ]
    assert gpu_stages.first_tiles(tests) == (tests[::2], tests[1::2])


def test_first_tiles_of_the_package():
    """There is one first tile for each kernel of each layer."""
    names = [name for name in verify.collect(gpu_stages.LARGE) if gpu_stages.TILES in name]
    first, others = gpu_stages.first_tiles(names)
    assert len(first) + len(others) == len(names)
    assert len(first) < len(others)


@pytest.fixture
def report(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "device_name", lambda device: "a GPU")
    environment = {"device": "a GPU", "driver": "9", "torch": "2", "triton": "3", "python": "3", "date": "d"}
    monkeypatch.setattr(results, "environment", lambda device: environment)
    monkeypatch.setattr(results, "tree", lambda: "this tree")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    return gpu_stages.Report(tmp_path, tmp_path, "cuda", time.monotonic() + 60)


def test_what_had_no_time_is_run_later(report, monkeypatch):
    """later.json names the tests that had no time. A call with --later adds them to the verdict. Only then is
    the device marked as verified, with a list of what was run on it.
    """
    monkeypatch.setattr(verify, "shards", lambda tests, *a: Verdict(passes=1, unfinished=len(tests) - 1))
    monkeypatch.setattr(verify, "outcomes", lambda folder: {"a": {"outcome": "passed"}})
    report._shards("tests", ["a", "b", "c"], 0.0)
    for name in ("configurations", "large"):
        Verdict(passes=2).write(report.output / f"{name}.json", **report.stamp)
    report._later("fallbacks", ["d"])
    assert gpu_mark.propose_table(report) is None
    stored = json.loads((report.output / gpu_stages.LATER).read_text())
    assert stored == {"of": report.key, "tests": {"tests": ["b", "c"], "fallbacks": ["d"]}}

    monkeypatch.setattr(verify, "shards", lambda tests, *a: Verdict(passes=len(tests)))
    monkeypatch.setattr(verify, "outcomes", lambda folder: {key: {"outcome": "passed"} for key in "abcd"})
    found = report.later(time.monotonic() + 60, stored["tests"], report.output)
    assert found.passed
    assert Verdict.load(report.output / "tests.json") == Verdict(passes=3)
    mark = json.loads(gpu_mark.propose_table(report).read_text())["verified"]
    assert mark["tiles"] == {"first": 2, "fallbacks": 1}


def test_a_fallback_that_fails_takes_the_mark(report):
    for name in gpu_mark.NEEDED:
        Verdict(passes=1).write(report.output / name, **report.stamp)
    assert gpu_mark.propose_table(report) is not None
    Verdict(passes=3, failures=("x",)).write(report.output / "fallbacks.json", **report.stamp)
    assert gpu_mark.propose_table(report) is None


def test_training_is_not_longer_than_its_time(report, monkeypatch):
    """The limit holds however much time the earlier stages left."""
    commands = []
    monkeypatch.setattr(report, "_run", lambda name, command, until: commands.append((command, until)))
    report.train(time.monotonic() + 1000)
    command, until = commands[0]
    assert until - time.monotonic() <= gpu_stages.TRAINING
    assert 60 * float(command[command.index("--minutes") + 1]) <= gpu_stages.TRAINING


def test_packed(tmp_path):
    """Files are packed under their names. Incomplete files are left out, and long logs lose their middle."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.txt").write_bytes(b"x" * 500_000 + b"end")
    (tmp_path / ".half").write_text("")
    (tmp_path / "b.json").write_bytes(b"{}")
    files = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*")}
    results.pack(files, tmp_path / "out" / "all.tar.gz")
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as archive:
        assert archive.getnames() == ["b.json", "logs/a.txt"]
        log = archive.extractfile("logs/a.txt").read()
    assert len(log) < 2 * results.LOG + 10
    assert log.endswith(b"end")


# -- gathering
# ------------------------------------------------------------------------------------------------------------


def script_of(folder, *arguments):
    command = ["bash", str(folder / "run.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_gathered(tmp_path):
    """``gather`` copies the tracked tree, the images and a script, and replaces an earlier copy. It refuses
    to copy too much, and a tree that has changed since is not run.
    """
    data, output = tmp_path / "images.npz", tmp_path / "out"
    data.write_bytes(b"0" * 1000)
    command = ["--data", str(data), "--no-wheels", "--output", str(output)]
    assert gather.main(command) == gather.main(command) == 0
    assert sorted(path.name for path in output.iterdir()) == ["gathered", "images.npz", "run.sh", "tree"]
    assert (output / "tree" / "tools" / "gpu_report.py").exists()
    assert not (output / "tree" / ".git").exists()
    (output / "tree" / "kernels" / "new.py").write_text("")
    for arguments, message in (
        ([], "expected smoke or report"),
        (["smoke", tmp_path / "r"], "run.sh: the tree has changed since it was gathered"),
    ):
        done = script_of(output, *arguments)
        assert done.returncode
        assert message in done.stderr
    (output / "tree" / "kernels" / "new.py").unlink()
    done = script_of(output, "dance", tmp_path / "r")
    assert (done.returncode, done.stderr) == (2, "run.sh: expected smoke or report, got dance\n")
    assert gather.main([*command, "--limit", "0.5"]) == 1


def test_a_folder_inside_the_tree_has_no_copy_of_it(tmp_path, capsys):
    """The tree travels once, and leaves room for images and wheels: 45.5 MiB."""
    output = ROOT / "gpu_run" / tmp_path.name
    try:
        assert gather.main(["--no-wheels", "--output", str(output), "--limit", "18"]) == 0
        assert "MiB  the tree around it" in capsys.readouterr().out
        assert sorted(path.name for path in output.iterdir()) == ["gathered", "run.sh"]
        done = script_of(output, "smoke", tmp_path / "r", "--jobs", "0")
        assert "--jobs: expected a positive number, got 0" in done.stderr  # the tool of the tree has been run
    finally:
        shutil.rmtree(output)


def test_gathering_replaces_only_its_own(tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    with pytest.raises(SystemExit):
        gather.main(["--no-wheels", "--output", str(tmp_path)])
    assert "expected a new folder or one that this program made" in capsys.readouterr().err
    assert (tmp_path / "precious").exists()


# -- the training
# ------------------------------------------------------------------------------------------------------------


def made_images(path, count=40):
    """Write a file in the layout of the image archive: JPEGs one after the other, and one image stored
    losslessly.
    """
    from PIL import Image

    generator, arrays = np.random.default_rng(0), {}
    for split in ("train", "test"):
        raws = []
        for i in range(count):
            pixels = np.full((32, 32, 3), 20 * (i % 10) + 30, np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            raws.append(buffer.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(raws), np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, raws)])
        arrays[f"{split}_label"] = np.arange(count, dtype=np.uint8) % 10
        arrays[f"{split}_lossless_idx"] = np.array([3], np.int32)
        arrays[f"{split}_lossless_rgb"] = generator.integers(256, size=(1, 32, 32, 3), dtype=np.uint8)
    np.savez(path, **arrays)
    return arrays


def test_decoded(tmp_path):
    arrays = made_images(tmp_path / "images.npz")
    images, labels = fast_training.read(tmp_path / "images.npz", "test", 20)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert (images[3].permute(1, 2, 0).numpy() == arrays["test_lossless_rgb"][0]).all()
    assert int((images[12].int() - 70).abs().max()) <= 2
    (tmp_path / "broken.npz").write_bytes(b"no")
    with pytest.raises(
        fast_training.TrainingProblem, match=r"broken.npz: expected an .npz file with train_jpeg"
    ):
        fast_training.read(tmp_path / "broken.npz", "train")


def trainer(count=40, **options):
    images, labels = fast_training.made_up(count)
    images = (20 * labels + 30)[:, None, None, None].expand_as(images).to(torch.uint8).contiguous()
    recipe = fast_training.recipe_of()
    recipe["model"]["temperature"] = 10
    return fast_training.Trainer(
        recipe, images, labels, "cpu", batch=20, **fast_training.TINY, **options
    ), recipe


def test_steps_learn():
    """The minimised loss falls, and the moving average follows the weights."""
    found, recipe = trainer()
    losses = []
    for _ in range(30):
        found.step(torch.arange(20), 3e-2)
        losses.append(float(found.sums[0]) / 20)
        found.sums.zero_()
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:3])
    apart = [
        float((a - p.detach()).norm() / p.detach().norm())
        for a, p in zip(found.ema, found.parameters, strict=True)
    ]
    assert 0 < max(apart) < 0.5


def test_a_step_is_that_of_the_recipe():
    """A step without augmentation equals the same step written by hand: autograd, clipped gradient, Adam."""
    found, recipe = trainer()
    found.spec = {}
    twin, _ = trainer()
    optimizer = torch.optim.Adam(twin.model.parameters(), lr=1e-3)
    index = torch.arange(20)
    logits = twin.model(twin.images[index].float() / 255)
    targets = torch.nn.functional.one_hot(twin.labels[index], 10).float()
    optimizer.zero_grad()
    torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    torch.nn.utils.clip_grad_norm_(twin.model.parameters(), recipe["optimizer"]["clip"])
    optimizer.step()
    found.step(index, 1e-3)
    for a, b in zip(found.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_crops_and_flips():
    """Every augmented image is a window of the padded image, mirrored or not."""
    found, _ = trainer(40)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    augmented = found._augmented(images)
    padded = torch.nn.functional.pad(images, [4] * 4)
    for image, whole in zip(augmented, padded, strict=True):
        windows = [whole[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)


def test_learning_rates():
    """The learning rate rises linearly to the recipe's rate for this batch size, then follows a cosine to the
    last one.
    """
    recipe = fast_training.recipe_of()
    rates = [fast_training.rate_of(recipe, 256, step, 1000, 100) for step in range(1001)]
    assert max(rates) == pytest.approx(2.5e-4 * (256 / 16) ** 0.5)
    assert rates[0] == pytest.approx(max(rates) / 100)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[550] == pytest.approx(max(rates) / 2)
    assert rates[1000] == pytest.approx(0, abs=1e-12)


def test_training_ends_in_time():
    """The schedule ends with the training, which reports how many steps it took."""
    found, recipe = trainer()
    test = (found.images[:10], found.labels[:10])
    begin, kept = time.monotonic(), []
    keep = lambda trainer, row: kept.append(row)
    row = fast_training.train(
        found, recipe, begin + 4, steps=None, test=test, keep=keep, every=1.0, say=lambda text: None
    )
    assert time.monotonic() - begin < 30
    assert kept
    assert row["steps"] == found.done == row["history"][-1]["step"]
    assert row["why_not_captured"] == "a CPU has no CUDA graphs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes: expected a positive number, got 0.0"),
        (["--device", "cpu"], "--data: expected the file of the images, got none"),
        (["--device", "cpu", "--data", "nowhere.npz"], "--data: no such file: nowhere.npz"),
        pytest.param(
            [],
            "needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_training_refuses(tmp_path, capsys, options, message):
    try:
        status = fast_training.main(["--output", str(tmp_path / "out"), *options])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", [gpu_smoke, gpu_report])
def test_runs_refuse(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--jobs", "0", "--device", "cpu", "--output", str(tmp_path / "out")])
    assert "--jobs: expected a positive number, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_report_refuses_another_file_for_later(tmp_path, capsys):
    (tmp_path / "later.json").write_text("[]")
    with pytest.raises(SystemExit):
        gpu_report.main(
            ["--later", str(tmp_path / "later.json"), "--device", "cpu", "--output", str(tmp_path / "out")]
        )
    assert "expected a later.json of this report" in capsys.readouterr().err
