"""The operators: torch's own checks, derivatives of any order, saved tensors, compilation, export, autocast,
FLOPs, and light imports.
"""

import io
import itertools
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import assert_close, random_layer
from torch.utils._python_dispatch import TorchDispatchMode

import coda_fast
from coda_fast._geometry import Geometry
from coda_fast._spec import Parameters, Spec
from coda_fast.backends import factored, reference
from coda_fast.backends.factored import matrices, windows
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

align, align_backward, adjoint = (
    getattr(torch.ops.coda_fast, name).default for name in ("align", "align_backward", "adjoint")
)
WINDOW = ([2, 1], [1, 0, 1, 2], [1, 2])  # stride, padding (left, right, top, bottom), dilation
ONE_LOOK = ([1, 1], [0, 0, 0, 0], [1, 1])
PLAIN = ("squash", 1e-6)
OUTPUT = (2, 4, 4, 6)  # 4 units with a kernel (3, 2) and the geometry WINDOW on an image of 6 x 7


def _image(layout="contiguous", dtype=torch.float64):
    base = torch.randn(4, 10, 6, 7).to(dtype)
    if layout == "sliced":
        return base[::2, ::2]
    return base[:2, :5].contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )


def _case(layout, dtype, bias=True, applied=False):
    """(x, u, [B, A, b]), all of which require gradients."""
    x, u = _image(layout, dtype), _image("contiguous", dtype) if applied else None
    parameters = [None if t is None else t.to(dtype) for t in random_layer(5, 4, 3, (3, 2), bias=bias)]
    tensors = [None if t is None else t.detach().requires_grad_() for t in (x, u, *parameters)]
    return tensors[0], tensors[1], tensors[2:]


def _needs(applied, bias, detach):
    return [not (detach and applied), applied, *(need and not detach for need in (True, True, bias))]


# -- torch's own checks: schema, registration, fake kernels (strides too), AOTAutograd with dynamic shapes
# -------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype", "bias", "applied", "detach", "keep"),
    [
        ("contiguous", torch.float64, True, False, False, "products"),
        ("channels_last", torch.float32, False, True, False, "products"),
        ("sliced", torch.bfloat16, True, False, True, "norm"),
        ("channels_last", torch.bfloat16, True, True, True, "norm"),
        ("sliced", torch.float32, False, False, False, "contraction"),
        ("contiguous", torch.float32, True, False, False, "nothing"),
    ],
    ids=str,
)
def test_opcheck(layout, dtype, bias, applied, detach, keep):
    x, u, parameters = _case(layout, dtype, bias, applied)
    torch.library.opcheck(align, (x, u, *parameters, *WINDOW, *PLAIN, detach, keep, "factored"))
    if keep != "nothing":
        output, *kept = align(x, u, *parameters, *WINDOW, *PLAIN, detach, keep, "factored")
        grad = torch.randn_like(output).requires_grad_()
        kept = [t.detach() for t in kept]
        needs = _needs(applied, bias, detach)
        if not detach and torch.__version__.startswith(("2.11.", "2.12.", "2.13.")):
            # torch 2.11 cannot trace the second derivative of conv2d, which the definition uses, with
            # symbolic sizes; 2.14 can
            grad, x, u, *parameters = (None if t is None else t.detach() for t in (grad, x, u, *parameters))
        torch.library.opcheck(
            align_backward, (grad, x, u, *parameters, *kept, *WINDOW, *PLAIN, detach, needs, "factored")
        )


@pytest.mark.parametrize(
    ("layout", "dtype", "bias"),
    [
        ("contiguous", torch.float64, False),
        ("channels_last", torch.bfloat16, True),
        ("sliced", torch.float32, True),
    ],
    ids=str,
)
def test_opcheck_adjoint(layout, dtype, bias):
    x, _, parameters = _case(layout, dtype, bias)
    value = torch.randn(OUTPUT).to(dtype).requires_grad_()
    torch.library.opcheck(adjoint, (x, value, *parameters, *WINDOW, *PLAIN, "factored"))


def test_formats_of_results():
    """The gradient of each image has the memory format of the image, and those of parameters are contiguous.
    The fake kernels return the same formats.
    """
    x, u, parameters = _case("channels_last", torch.float32, applied=True)
    needs = _needs(True, True, False)

    def results(x, u, *parameters):
        with torch.no_grad():
            output, *kept = align(x, u, *parameters, *WINDOW, *PLAIN, False, "products", "factored")
            grads = align_backward(
                torch.ones_like(output), x, u, *parameters, *kept, *WINDOW, *PLAIN, False, needs, "factored"
            )
            return output, *kept, *grads, adjoint(x, output, *parameters, *WINDOW, *PLAIN, "factored")

    real = results(x, u, *parameters)
    output, dot, square, contraction, prepared, dx, du, *rest, transposed = real
    assert all(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (output, dx, transposed)
    )
    assert all(t.is_contiguous() for t in (du, *rest))
    fake = results(*(t.to("meta") for t in (x, u, *parameters)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("backend", ["factored", "triton"])
def test_gradients_of_1x1_layers_have_the_strides_of_their_parameters(backend):
    """is_contiguous() ignores axes of size 1, but DDP compares strides and warns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = coda_fast.DAUConv2d(4, 6, 1, rank=3, backend=backend).to(device)
    layer(torch.randn(2, 4, 5, 5, device=device)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.stride() == parameter.stride()


# -- several gradients at once (vmap)
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["squash", "l2"])
@pytest.mark.parametrize(
    ("layout", "dtype", "bias", "applied"),
    [
        ("contiguous", torch.float64, True, False),
        ("channels_last", torch.float32, False, True),
        ("sliced", torch.bfloat16, True, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_several_gradients_in_explanation_mode(layout, dtype, bias, applied, norm, chunk, monkeypatch):
    """The weights of a layer are computed once for all gradients, each of which equals the definition's
    adjoint.
    """
    monkeypatch.setattr(windows, "CHUNK_PARAMETERS", 0)
    monkeypatch.setitem(matrices.CHUNK_BYTES, "cpu", chunk)
    x, u, parameters = _case(layout, dtype, bias, applied)
    values = torch.randn(3, *OUTPUT).to(dtype)
    made = []
    adjoints = factored.adjoints
    monkeypatch.setattr(
        factored, "adjoints", lambda values, *rest: made.append(len(values)) or adjoints(values, *rest)
    )
    y = align(x, u, *parameters, *WINDOW, norm, 1e-6, True, "norm", "factored")[0]
    leaf = u if applied else x
    found = torch.func.vmap(lambda v: torch.autograd.grad(y, leaf, v, retain_graph=True)[0])(values)
    assert made == [3]
    assert found.dtype == dtype
    stride, padding, dilation = map(tuple, WINDOW)
    spec = Spec(Geometry(tuple(parameters[1].shape[3:]), stride, dilation, padding), norm, 1e-6)
    exact, *others = (None if t is None else t.detach().double() for t in (x, *parameters))
    for k, value in enumerate(values):
        expected = reference.adjoint(exact, value.double(), Parameters(*others), spec)
        rounding = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
        assert_close(found[k].double(), expected, rounding)


@pytest.mark.parametrize("detach", [False, True])
def test_vmap_of_everything_else(detach):
    """All other batched arguments are computed one after the other, and differentiably."""
    tensors, many = _small(False), torch.randn(3, 1, 2, 3, 3, dtype=torch.float64)
    layer = lambda x: dau_conv2d(x, *tensors[2:], detach=detach)
    torch.testing.assert_close(torch.func.vmap(layer)(many), torch.stack([layer(x) for x in many]))
    values = torch.randn(3, 1, 2, 2, 2, dtype=torch.float64)
    transpose = lambda x, v: dau_conv2d_transpose(x, v, *tensors[2:])
    expected = torch.stack([transpose(x, v) for x, v in zip(many, values, strict=True)])
    torch.testing.assert_close(torch.func.vmap(transpose)(many, values), expected)
    y = layer(tensors[0])
    jacobian = lambda graph: torch.func.vmap(
        lambda v: torch.autograd.grad(y, tensors[0], v, retain_graph=True, create_graph=graph)[0]
    )(values)
    expected = torch.stack([torch.autograd.grad(y, tensors[0], v, retain_graph=True)[0] for v in values])
    torch.testing.assert_close(jacobian(False), expected)
    assert jacobian(True).requires_grad
    torch.testing.assert_close(jacobian(True), expected)


# -- derivatives
# ------------------------------------------------------------------------------------------------------------


def _small(applied, bias=True):
    tensors = [torch.randn(1, 2, 3, 3, dtype=torch.float64), *random_layer(2, 2, 2, (2, 2), bias=bias)]
    u = torch.randn_like(tensors[0]) if applied else None
    return [None if t is None else t.requires_grad_() for t in (tensors[0], u, *tensors[1:])]


@pytest.mark.parametrize("norm", ["squash", "l2"])
@pytest.mark.parametrize("applied", [False, True])
def test_derivatives_of_align(applied, norm):
    tensors = _small(applied)
    output = lambda *t: align(*t, *ONE_LOOK, norm, 1e-6, False, "products", "factored")[0]
    assert torch.autograd.gradcheck(output, tensors)
    assert torch.autograd.gradgradcheck(output, tensors)


@pytest.mark.parametrize("norm", ["squash", "l2"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("applied", [False, True])
def test_derivatives_of_align_backward(applied, detach, norm):
    """Second and third derivatives of the layer, all gradients at once; in explanation mode those of the
    direct term.
    """
    tensors, needs = _small(applied, bias=not detach), _needs(applied, not detach, detach)
    v = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def gradients(v, *tensors):
        _, *kept = align(
            *tensors, *ONE_LOOK, norm, 1e-6, detach, "norm" if detach else "products", "factored"
        )
        found = align_backward(v, *tensors, *kept, *ONE_LOOK, norm, 1e-6, detach, needs, "factored")
        assert all((t.numel() > 0) == need for t, need in zip(found, needs, strict=True))
        return tuple(t for t in found if t.numel())

    assert torch.autograd.gradcheck(gradients, (v, *tensors))
    assert torch.autograd.gradgradcheck(gradients, (v, *tensors), atol=1e-4)


def test_derivatives_of_adjoint():
    x, _, *parameters = _small(False)
    v = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    function = lambda *t: adjoint(*t, *ONE_LOOK, *PLAIN, "factored")
    assert torch.autograd.gradcheck(function, (x, v, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, v, *parameters))


@pytest.mark.parametrize("which", range(4))
def test_penalty_on_one_gradient(which):
    """The other gradients of a double backward pass are undefined, and not zeros to be multiplied."""
    x, _, parameters = _case("contiguous", torch.float64)
    tensors = [x, *parameters]

    def penalty(backend):
        loss = dau_conv2d(*tensors, padding=1, backend=backend).square().sum()
        return torch.autograd.grad(
            torch.autograd.grad(loss, tensors[which], create_graph=True)[0].square().sum(), tensors
        )

    for ours, truth in zip(penalty("factored"), penalty("reference"), strict=True):
        assert_close(ours, truth, 1e-11)


# -- what forward keeps
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True])
def test_every_keep_gives_the_same_gradients(detach):
    x, _, parameters = _case("contiguous", torch.float64)
    columns, none = torch.Size([4, 2 * 4 * 6]), torch.Size([0])
    shapes = {
        "nothing": (none,) * 4,
        "norm": (none, columns, none, none),
        "products": (columns, columns, none, none),
    }
    rank = parameters[1].shape[1]
    shapes["contraction"] = (columns, columns, torch.Size([4 * rank, 2 * 4 * 6]), none)
    results = []
    for keep, expected in shapes.items():
        output, *kept = align(x, None, *parameters, *WINDOW, *PLAIN, detach, keep, "factored")
        assert tuple(t.shape for t in kept) == expected
        assert not any(t.requires_grad for t in kept)
        grads = torch.autograd.grad(output.square().sum(), [x, *parameters], allow_unused=True)
        results.append([output, *(g for g in grads if g is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class _Calls(TorchDispatchMode):
    """Records the operators of coda_fast and their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "coda_fast":
            self.found.append((function._opname, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "frozen", "keep"),
    [
        ({}, False, "products"),  # small patches
        (dict(save_contraction=True), False, "contraction"),
        (dict(save_contraction=False), False, "products"),
        (dict(detach=True, save_contraction=True), False, "norm"),
        ({}, True, "nothing"),
        (dict(detach=True), True, "nothing"),
    ],
    ids=str,
)
def test_keeps_what_a_backward_pass_needs(options, frozen, keep):
    """``frozen``: no tensor requires a gradient that could; in explanation mode that is the input."""
    x, _, parameters = _case("contiguous", torch.float32)
    if frozen:
        x = x.detach()
        parameters = parameters if options else [t.detach() for t in parameters]
    with _Calls() as calls:
        dau_conv2d(x, *parameters, **options)
        with torch.no_grad():
            dau_conv2d(x, *parameters, **options)
    assert [args[11] for _, args in calls.found] == [keep, "nothing"]


def test_layer_passes_save_contraction():
    with _Calls() as calls:
        coda_fast.DAUConv2d(5, 4, 3, save_contraction=True)(_image(dtype=torch.float32))
    assert calls.found[0][1][11] == "contraction"


def test_only_gradients_that_are_needed():
    x, _, parameters = _case("contiguous", torch.float32)
    output = dau_conv2d(x.detach(), parameters[0], parameters[1].detach(), parameters[2])
    with _Calls() as calls:
        output.sum().backward()
    ((name, args),) = calls.found
    assert name == "align_backward"
    assert args[16] == [False, False, True, False, True]
    assert x.grad is None
    assert parameters[1].grad is None


def test_refuses():
    x, _, parameters = _case("contiguous", torch.float32)
    with pytest.raises(ValueError, match="keep: expected one of 'nothing', .*got 'all'"):
        align(x, None, *parameters, *WINDOW, *PLAIN, False, "all", "factored")
    with pytest.raises(ValueError, match="backend: expected 'factored' or 'triton', got 'reference'"):
        align(x, None, *parameters, *WINDOW, *PLAIN, False, "products", "reference")


# -- torch.compile and torch.export
# -----------------------------------------------------------------------------------------------------


def _network(dtype=torch.float64):
    return coda_fast.CoDANet(
        [4, 5, 3], ranks=[4, 4, 2], kernel_sizes=[3, 3, 1], strides=[2, 1, 1], temperature=3.0, dtype=dtype
    )


def _logits_and_grads(function, images, parameters):
    logits = function(images)
    target = F.one_hot(torch.arange(len(images)) % 3, 3).to(logits.dtype)
    return logits, *torch.autograd.grad(
        F.binary_cross_entropy_with_logits(logits, target), [images, *parameters]
    )


def _assert_same(ours, eager, bound):
    for i, (a, b) in enumerate(zip(ours, eager, strict=True)):
        assert a.dtype == b.dtype
        assert_close(a, b, bound, f"result {i}")


@pytest.fixture
def compiler():
    """torch.compile(fullgraph=True), which raises at a graph break, and a counter of compilations."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()

    def make(function, backend="aot_eager"):
        counter = CompileCounterWithBackend(backend)
        return torch.compile(function, fullgraph=True, backend=counter), counter

    yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("marked", [False, True])
def test_compile_training(compiler, marked):
    """Logits and gradients equal those of the eager network within 1e-12, with at most one static and one
    dynamic compilation for all batch sizes.
    """
    model = _network()
    compiled, counter = compiler(model)
    for batch in (2, 3, 4, 5):
        images = torch.rand(batch, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        if marked:
            torch._dynamo.mark_dynamic(images, 0)
        ours, eager = (_logits_and_grads(f, images, model.parameters()) for f in (compiled, model))
        _assert_same(ours, eager, 1e-12)
    assert counter.frame_count == (1 if marked else 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_channels_last_and_autocast(compiler, autocast):
    model = _network(torch.float32)
    compiled, _ = compiler(model)
    images = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, eager = (_logits_and_grads(f, images, model.parameters()) for f in (compiled, model))
    _assert_same(ours, eager, 1e-6)


def test_compile_explanation_mode(compiler):
    model = _network()

    def logits(images):
        with model.explanation_mode():
            return model(images)

    compiled, counter = compiler(logits)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    ours, eager, plain = (
        torch.autograd.grad(f(images)[:, 1].sum(), images)[0] for f in (compiled, logits, model)
    )
    assert counter.frame_count == 1
    assert_close(ours, eager, 1e-12)
    assert not torch.allclose(ours, plain), "explanation mode has another gradient"
    assert not any(layer.explaining for layer in model.layers)


def test_compile_adjoint(compiler):
    x, _, parameters = _case("contiguous", torch.float64)
    value = torch.randn(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    compiled, _ = compiler(dau_conv2d_transpose)
    tensors = [x, value, *parameters]
    results = [
        (y := f(*tensors), *torch.autograd.grad(y.square().sum(), tensors))
        for f in (compiled, dau_conv2d_transpose)
    ]
    _assert_same(*results, 1e-12)


@pytest.mark.slow
def test_compile_with_inductor(compiler):
    """Also within 1e-12. Inductor generates code for the encoder, the pooling and the loss."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("inductor needs a C++ compiler: none of g++, clang++, c++ is here")
    model = _network()
    compiled, counter = compiler(model, "inductor")
    for batch in (2, 3, 5):
        images = torch.rand(batch, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        _assert_same(*(_logits_and_grads(f, images, model.parameters()) for f in (compiled, model)), 1e-12)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("grad", [True, False])
def test_export(grad):
    """One program for every batch size equals the network, also after saving. It can be trained, however it
    was exported.
    """
    model = _network()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert [str(node.target) for node in program.graph.nodes].count("coda_fast.align.default") == 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        for batch in (1, 2, 5):
            images = torch.rand(batch, 3, 8, 8, dtype=torch.float64)
            assert torch.equal(exported(images), model(images))
        ours, eager = (
            _logits_and_grads(m, images.requires_grad_(), m.parameters()) for m in (exported, model)
        )
        _assert_same(ours, eager, 1e-14)


# -- autocast
# ------------------------------------------------------------------------------------------------------------


def test_autocast_of_the_operators():
    """Operators called directly cast like a convolution, and differentiably. float64 is not cast. Backward is
    the same inside and outside of autocast.
    """
    x, u, parameters = _case("contiguous", torch.float32, applied=True)
    tensors = [x, u, *parameters]
    half = [t.bfloat16() for t in tensors]
    value = torch.randn(OUTPUT)
    rest = (*WINDOW, *PLAIN, False, "products", "factored")
    with torch.autocast("cpu", torch.bfloat16):
        output, *kept = align(*tensors, *rest)
        transposed = adjoint(x, value, *parameters, *WINDOW, *PLAIN, "factored")
        inside = torch.autograd.grad(output, tensors, value.bfloat16(), retain_graph=True)
        assert align(*(t.double() for t in tensors), *rest)[0].dtype == torch.float64
    by_hand, *kept_by_hand = align(*half, *rest)
    assert output.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip((output, *kept), (by_hand, *kept_by_hand), strict=True))
    assert torch.equal(transposed, adjoint(half[0], value.bfloat16(), *half[2:], *WINDOW, *PLAIN, "factored"))
    gradients = lambda: align_backward(
        value.bfloat16(), *half, *kept_by_hand, *WINDOW, *PLAIN, False, _needs(True, True, False), "factored"
    )
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = gradients()
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, gradients(), strict=True)), (
        "inside, the backend chooses the precision"
    )
    outside, expected = (torch.autograd.grad(y, tensors, value.bfloat16()) for y in (output, by_hand))
    for a, b, c in zip(inside, outside, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("function", ["plain", "detach", "adjoint"])
def test_backward_inside_autocast_keeps_float32(function):
    """The backward pass of a graph made outside of autocast keeps its dtype, also for second derivatives."""
    x, _, parameters = _case("contiguous", torch.float32)
    tensors = [x, *parameters]

    if function == "adjoint":
        y = dau_conv2d_transpose(x, torch.randn(2, 4, 4, 6), *parameters)
    else:
        y = dau_conv2d(*tensors, detach=function == "detach")
    v = torch.randn_like(y)

    def gradients():
        (g,) = torch.autograd.grad(y, x, v, create_graph=True)
        return g, *torch.autograd.grad(g.square().sum(), tensors, retain_graph=True)

    outside = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients()
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


# -- FLOPs and imports
# ------------------------------------------------------------------------------------------------------------


def test_flops():
    """The closed formula of the multiply-adds for each operator."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        counts = {
            str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "coda_fast" in str(op)
        }
        return result, counts

    (batch, channels, height, width), units = (2, 5, 6, 7), 4
    for rank, kernel in itertools.product((3, 40), ((3, 3), (1, 2))):
        pixels, d = (
            batch * (height - kernel[0] + 1) * (width - kernel[1] + 1),
            channels * kernel[0] * kernel[1],
        )
        main, reduce, norm = (
            2 * pixels * units * rank * d,
            2 * pixels * rank * d,
            2 * pixels * units * rank * min(rank, d),
        )
        forward = main + reduce + norm
        x = torch.randn(batch, channels, height, width, requires_grad=True)
        parameters = random_layer(channels, units, rank, kernel, dtype=torch.float32, grad=True)
        output, counts = count(lambda x=x, p=parameters: dau_conv2d(x, *p))
        assert counts == {"coda_fast.align": forward}
        assert count(output.sum().backward)[1] == {
            "coda_fast.align_backward": 3 * main + 3 * reduce + 2 * norm
        }
        _, counts = count(lambda x=x, p=parameters: dau_conv2d(x.detach(), *p).sum().backward())
        assert counts == {
            "coda_fast.align": forward,
            "coda_fast.align_backward": 2 * (main + reduce + norm),
        }, "the first layer"
        _, counts = count(lambda x=x, p=parameters: dau_conv2d(x, *p, detach=True).sum().backward())
        assert counts == {"coda_fast.align": forward, "coda_fast.align_backward": main + reduce}, (
            "an explanation"
        )
        _, counts = count(lambda x=x, v=output, p=parameters: dau_conv2d_transpose(x, v.detach(), *p))
        assert counts == {"coda_fast.adjoint": forward}


@pytest.mark.parametrize("first", [True, False])
def test_eager_use_is_light(first):
    """Eager use imports neither the compiler nor Triton nor the FLOP counter. The counter still works,
    whichever is imported first.
    """
    script = f"""
        import sys, torch
        if {first}:
            import torch.utils.flop_counter
        import coda_fast
        model = coda_fast.CoDANet([4, 3], ranks=[2, 2], kernel_sizes=[3, 1], strides=[1, 1], temperature=3.0)
        images = torch.rand(2, 3, 8, 8)
        model(images).sum().backward()
        model.explain(images)
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
        heavy = ["torch._dynamo", "torch._inductor"]
        heavy += [] if {first} else ["triton", "torch.utils.flop_counter"]
        assert not [name for name in heavy if name in sys.modules]
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            model(images)
        hooks = [f for f in sys.meta_path if type(f).__module__.startswith("coda_fast")]
        assert not hooks, "the hook has done its work"
        print(counter.get_total_flops())
    """
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-W", "error:::coda_fast", "-c", textwrap.dedent(script)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    flops = lambda n, r, d: 2 * 2 * 64 * (n * r * d + r * d + n * r * min(r, d))
    assert int(run.stdout) == flops(4, 2, 6 * 9) + flops(3, 2, 4)
