"""What the tests of the web page share: networks, pictures, a client that asks as the page does."""

import io
import json
import shutil
import socket

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import coda_fast

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt install chromium)")
# A minute or more is no failure on a busy machine; no test asserts how long something takes.
PATIENCE = 120_000  # milliseconds
CLASSES = [f"digit {i}" for i in range(10)]
FLAGS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def network(seed):
    torch.manual_seed(seed)
    # a low temperature, for maps with strong contributions
    return coda_fast.create_model("coda_xs_digits", class_names=CLASSES, temperature=1.0).eval()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def encoded(seed=0, size=(20, 30), format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file, format)
    return file.getvalue()


class User:
    """Asks the server as the page does."""

    def __init__(self, server):
        self.client = httpx.Client(base_url=server, timeout=PATIENCE / 1000)
        config = self.client.get("/config").json()
        self.functions = {f["api_name"]: f["id"] for f in config["dependencies"] if f["api_name"]}
        self.count = 0

    def upload(self, data, name="a.png"):
        answer = self.client.post("/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200, answer.text
        (path,) = answer.json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def ask(self, function, *data):
        """The answer's values, or the message of its error."""
        self.count += 1
        session = f"{id(self)}-{self.count}"
        joined = self.client.post(
            "/gradio_api/queue/join",
            json={"data": data, "fn_index": self.functions[function], "session_hash": session},
        )
        assert joined.status_code == 200, joined.text
        answers = []
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    answers.append(message)
        (message,) = answers
        return message["output"]["data" if message["success"] else "error"]


def film(path, frames, rate):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "30"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            pixels = np.zeros((32, 48, 3), np.uint8)
            pixels[8:24, i % 32 : i % 32 + 16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()
