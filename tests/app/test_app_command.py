"""Starting and ending ``coda-fast app``."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support_app import PATIENCE, User, encoded, free_port, network

import coda_fast
from coda_fast import app, cli, pretrained
from coda_fast.app import page as pages
from coda_fast.data.photographs import example_photographs

# Once is enough: a release of torch changes nothing in the browser.
pytestmark = pytest.mark.slow


NAMES = pretrained.names()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("app") / "net.safetensors"
    coda_fast.save(network(0), path)
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["app", *map(str, arguments)])
    return stop.value.code


def test_the_port_is_taken(checkpoint, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("--checkpoint", checkpoint, "--port", port) == 2
    assert capsys.readouterr().err == (
        f"coda-fast: port: expected a free one, got {port}, which is taken or not permitted\n"
    )


def test_gradio_is_missing(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run("--checkpoint", checkpoint) == 2
    assert capsys.readouterr().err == "coda-fast: the app needs gradio: pip install 'coda-fast[app]'\n"


@pytest.mark.parametrize(
    ("networks_", "default", "error", "message"),
    [
        ({}, None, ValueError, "networks: expected at least one, got none"),
        ({"a": network(0)}, "b", ValueError, "default: expected one of a, got 'b'"),
        (
            {"a": torch.nn.Identity()},
            None,
            TypeError,
            "networks: a: expected a coda_fast.Network, got a Identity",
        ),
    ],
)
def test_build_refuses(networks_, default, error, message):
    with pytest.raises(error, match=re.escape(message)):
        app.build(networks_, default)


@pytest.mark.parametrize(
    ("networks_", "default"),
    [
        (dict.fromkeys(NAMES, network(0)), pages.BY_SIZE),
        (dict.fromkeys(reversed(NAMES[1:]), network(0)), NAMES[-1]),
    ],
)
def test_the_first_choice(networks_, default):
    """By the size of the picture, if the networks for all sizes are there; else the first network."""
    page = app.build(networks_)
    with page.folder:
        components = page.get_config_file()["components"]
    (props,) = [c["props"] for c in components if c["props"].get("elem_id") == "coda-network"]
    assert props["value"] == props["choices"][0][0] == default


def test_without_captum_and_av(networks, monkeypatch):
    """The page says what is missing."""
    find_spec = pages.importlib.util.find_spec
    monkeypatch.setattr(
        pages.importlib.util, "find_spec", lambda name: None if name in ("captum", "av") else find_spec(name)
    )
    page = app.build(networks)
    with page.folder:
        text = json.dumps(page.get_config_file()["components"])
    assert "They need captum: pip install 'coda-fast[evaluation]'" in text
    assert "Videos need PyAV: pip install 'coda-fast[video]'" in text


def test_example_photographs():
    """Each is there, can be decoded, and names its licence."""
    found = example_photographs()
    assert len(found) == 6
    for path, credit in found:
        assert min(coda_fast.data.decode(path).size) >= 300
        assert credit.endswith(("CC0", "CC BY 2.0", "public domain"))


class Program:
    """The command in a process of its own."""

    def __init__(self, temporary, *options):
        port = free_port()
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coda_fast.cli", "app", "--port", str(port), *options],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # a shell lets what it runs in the background, such as these tests, ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        watch = threading.Timer(120, self.process.kill)
        watch.start()
        self.line = self.process.stdout.readline()
        watch.cancel()
        self.address = f"http://127.0.0.1:{port}/"

    def end(self, number):
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=PATIENCE / 1000)
        return self.process.returncode, output, errors


def test_the_command(tmp_path):
    """One line with the address; an interruption ends it quietly and leaves nothing behind. By default the
    page has the networks of the package.
    """
    program = Program(tmp_path)
    assert program.line == f"{program.address}   (Ctrl-C ends it)\n"
    user = User(program.address)
    for name in NAMES:
        view = user.ask("explain", user.upload(encoded()), name, [])[1]
        assert re.search(f"<h2>a.png: .*, explained by {name}</h2>", view)
    for size, name in (((12, 40), "coda_xs_digits"), ((40, 33), "coda_xs_cifar10"), ((60, 90), NAMES[-1])):
        view = user.ask("explain", user.upload(encoded(size=size)), pages.BY_SIZE, [])[1]
        assert re.search(f"<h2>a.png: .*, explained by {name}</h2>", view)
    question = {"fn_index": user.functions["explain"], "session_hash": "open"}
    for _ in range(9):
        data = [user.upload(encoded()), "coda_xs_imagenette", ["IntGrad", "GCam"]]
        assert user.client.post("/gradio_api/queue/join", json=question | {"data": data}).status_code == 200
    with user.client.stream("GET", "/gradio_api/queue/data?session_hash=open"):  # a page that still waits
        assert program.end(signal.SIGINT) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


COMPUTES = """
import threading, time
import torch
from support_app import User, encoded, free_port, network
from coda_fast import app, viewer

started = threading.Event()

def slow(*arguments, **options):
    started.set()
    model, end = torch.nn.Conv2d(3, 3, 3), time.monotonic() + 3
    while time.monotonic() < end:
        model(torch.rand(1, 3, 64, 64)).sum().backward()
    return {}

viewer.describe = slow
with app.running({"a": network(0)}, port=free_port()) as address:
    user = User(address)
    threading.Thread(target=user.ask, args=("explain", user.upload(encoded()), "a", []), daemon=True).start()
    started.wait(60)
"""


def test_the_end_of_a_program_that_computes():
    """It waits for the answer under way: PyTorch aborts a program that ends while a thread differentiates."""
    done = subprocess.run(
        [sys.executable, "-c", COMPUTES],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (".", *sys.path) if p)},
        capture_output=True,
        text=True,
        timeout=PATIENCE / 1000,
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr


@pytest.mark.slow
def test_memory_stays_flat(checkpoint, tmp_path):
    """1,000 requests of as many users, with pictures, errors and reports among them."""
    psutil = pytest.importorskip("psutil")
    program = Program(tmp_path, "--checkpoint", str(checkpoint))
    process, user, sizes = psutil.Process(program.process.pid), User(program.address), []
    for i in range(1000):
        data = encoded(i) if i % 10 else b"nothing"
        found = user.ask("report" if i % 10 == 5 else "explain", user.upload(data), "net", ["IxG"])
        assert isinstance(found, str) == (i % 10 == 0)
        if i % 100 == 99:
            sizes.append(process.memory_info().rss / 2**20)
    print("MiB after each 100 requests:", [round(size, 1) for size in sizes])
    assert program.end(signal.SIGTERM) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    # gradio keeps an empty queue of about 4 KB for each of the last 2,000 pages
    assert sizes[-1] - sizes[1] < 20, sizes
