"""Helpers for the tests of export: images, a trained network and onnxruntime sessions."""

import functools

import torch
import torch.nn.functional as F

import coda_fast


def digits():
    """Scans of digits [N, 1, 8, 8] and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images / 16).float()[:, None], torch.from_numpy(data.target)


def photograph(side):
    """A colour photograph, [1, 3, side, side + 4]."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    return F.interpolate(pixels, (side, side + 4), mode="bilinear", antialias=True).clamp(0, 1)


def onnx_session(path):
    """An onnxruntime session of the file, after a check that it has standard operators only."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(session, *tensors):
    """The outputs of the session as tensors."""
    names = [entry.name for entry in session.get_inputs()]
    results = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
    return [torch.from_numpy(result) for result in results]


@functools.cache
def trained_network():
    """A network that tells digits apart, after a few seconds of training. It is trained once per process."""
    torch.manual_seed(0)
    model = coda_fast.create_model(
        "coda_xs_digits", temperature=10.0, class_names=[f"digit {i}" for i in range(10)]
    )
    images, classes = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        chosen = torch.arange(step * 64, (step + 1) * 64) % 1500
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(
            model(images[chosen]), F.one_hot(classes[chosen], 10).float()
        ).backward()
        optimizer.step()
    with torch.no_grad():
        assert (model(images[1500:]).argmax(1) == classes[1500:]).float().mean() > 0.7
    return model
