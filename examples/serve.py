"""Explanations over HTTP: ``python examples/serve.py``, then

    curl --data-binary @photo.jpg http://127.0.0.1:8000

returns JSON: the class, its probability and logit, the bias, and the map. The sum of map and bias is the
logit. One network serves all threads, because explanation mode belongs to a call and not to the module.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import coda_fast
from coda_fast.data import ImageError


def explained(model: coda_fast.CoDANet, picture: bytes) -> dict:
    """The answer for the bytes of a picture file. Raises ImageError if they are not a picture."""
    found = model.explain(model.transform(picture)[None])
    target = int(found.target)
    return {
        "class": found.name(target),
        "probability": float(found.logits[0, target].sigmoid()),
        "logit": float(found.logits[0, target]),
        "bias": found.logit_bias,
        "contribution_map": found.contribution_map[0, 0].tolist(),  # [H, W], in logits
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="coda_xs_imagenette")
    parser.add_argument("--port", type=int, default=8000)  # 0: any free port
    options = parser.parse_args()
    model = coda_fast.pretrained.load(options.checkpoint).eval()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            try:
                if not 0 < length <= 32 << 20:
                    raise ImageError(f"expected a picture of at most 32 MiB, got {length} bytes")
                self.answer(200, explained(model, self.rfile.read(length)))
            except ImageError as error:
                self.answer(400, {"error": str(error)})

        def answer(self, status: int, content: dict) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
