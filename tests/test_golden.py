"""Comparison with values that the authors' implementation gave in float64, the independent truth."""

import pytest
import torch
import torch.nn.functional as F
from support import BACKENDS, LAYERS, Golden, relative_error

from coda_fast import checkpoints
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
# the fused kernels do not support float64
CASES = [*((dtype, backend) for dtype in BOUNDS for backend in BACKENDS), (torch.float32, "triton")]
DTYPE_AND_BACKEND = pytest.mark.parametrize(
    ("dtype", "backend"), CASES, ids=lambda value: str(value).removeprefix("torch.")
)


def device_of(backend):
    """A GPU for the kernels if there is one. The other backends run on the CPU, which has no TF32."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def layer_errors(name, dtype, backend):
    """Relative error of the output, of every gradient and of the explanation, against the golden file in
    float64.
    """
    truth, golden = Golden(name), Golden(name, dtype, device_of(backend))
    m = golden.meta
    tensors = [golden["input"], *golden.layer("param")]
    tensors = [None if t is None else t.clone().requires_grad_() for t in tensors]
    options = dict(stride=m["s"], padding=m["p"], norm=m["norm"], backend=backend)
    output = dau_conv2d(*tensors, **options)
    errors = {"output": relative_error(output, truth["output"])}
    wanted = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(output, wanted, golden["grad_output"])
    expected = [truth["grad/x"], *truth.layer("grad")]
    for key, actual, gold in zip(
        ("input", "reduction_weight", "weight", "bias"), grads, expected, strict=False
    ):
        errors[f"grad {key}"] = relative_error(actual, gold)
    detached = dau_conv2d(*tensors, **options, detach=True)
    errors["detached output"] = relative_error(detached, truth["output"])
    (explained,) = torch.autograd.grad(detached, tensors[0], golden["grad_output"])
    errors["explanation"] = relative_error(explained, truth["explain_grad_input"])
    adjoint = dau_conv2d_transpose(tensors[0], golden["grad_output"], *tensors[1:], **options)
    errors["adjoint"] = relative_error(adjoint, truth["explain_grad_input"])
    return errors


@DTYPE_AND_BACKEND
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, dtype, backend, record_property):
    errors = layer_errors(name, dtype, backend)
    # experiments/golden.py makes the table of docs/numbers.md from these errors
    record_property("layer", Golden(name).meta)
    record_property("case", f"{backend}, {str(dtype).removeprefix('torch.')}")
    record_property("errors", errors)
    assert len(errors) == (8 if Golden(name).meta["bias"] else 7)
    assert max(errors.values()) < BOUNDS[dtype], errors


@DTYPE_AND_BACKEND
@pytest.mark.parametrize("prefix", ["", "module."])
def test_net(dtype, backend, prefix):
    truth, golden = Golden("net_small"), Golden("net_small", dtype, device_of(backend))
    m, bound = golden.meta, BOUNDS[dtype]
    state = {prefix + key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}
    model = checkpoints.from_published(
        state,
        strides=m["strides"],
        paddings=m["paddings"],
        temperature=m["temperature"],
        logit_bias=m["logit_bias"],
        norm=m["norm"],
    )
    model = model.to(device_of(backend))
    for layer in model.layers:
        layer.backend = backend
    assert [layer.out_channels for layer in model.layers] == m["out_channels"]
    assert [layer.rank for layer in model.layers] == m["ranks"]
    assert [layer.kernel_size[0] for layer in model.layers] == m["kernel_sizes"]
    logits = model(golden["image"])
    assert relative_error(logits, truth["logits"]) < bound
    loss = F.binary_cross_entropy_with_logits(
        logits, F.one_hot(golden["target"], model.num_classes).to(dtype)
    )
    assert relative_error(loss, truth["loss"]) < bound
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():  # the same conversion applies to gradients
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.copy_(grad)
    published = checkpoints.to_published(model)
    assert published.keys() == {key.removeprefix("grad/") for key in golden.keys("grad/")}
    for key, grad in published.items():
        assert relative_error(grad, truth[f"grad/{key}"]) < bound, key


@DTYPE_AND_BACKEND
def test_explanation_of_net(dtype, backend):
    truth, golden = Golden("net_small"), Golden("net_small", dtype, device_of(backend))
    m = golden.meta
    state = {key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}
    model = checkpoints.from_published(
        state,
        strides=m["strides"],
        paddings=m["paddings"],
        temperature=m["temperature"],
        logit_bias=m["logit_bias"],
    )
    model = model.to(device_of(backend))
    for layer in model.layers:
        layer.backend = backend
    explanation = model.explain(golden["image"], golden["target"])
    assert relative_error(explanation.dynamic_weight[:, 0], truth["dynamic_weight"]) < BOUNDS[dtype]
    assert relative_error(explanation.contribution_map[:, 0], truth["contribution_map"]) < BOUNDS[dtype]


def test_published_round_trip_is_bit_exact():
    golden = Golden("net_small")
    m = golden.meta
    state = {key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}
    model = checkpoints.from_published(
        state,
        strides=m["strides"],
        paddings=m["paddings"],
        temperature=m["temperature"],
        logit_bias=m["logit_bias"],
    )
    back = checkpoints.to_published(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
