"""Every way to differentiate in torch: torch.func and its transforms in any order, forward mode, and
per-sample gradients.

They are compared with finite differences (gradcheck) and with the reference backend, which is made of torch's
own operators.
"""

import functools
import itertools

import pytest
import torch
from support import assert_close, random_layer
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import coda_fast
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

align, adjoint = torch.ops.coda_fast.align.default, torch.ops.coda_fast.adjoint.default
NORMS = ("squash", "l2")
BACKENDS = ("reference", "factored")
WINDOW = ([2, 1], [1, 0, 1, 2], [1, 2])  # stride, padding (left, right, top, bottom), dilation


def _tensors(*, bias=True, grad=True, batch=1):
    image = torch.randn(batch, 2, 3, 3, dtype=torch.float64)
    return [
        None if t is None else t.requires_grad_(grad)
        for t in (image, *random_layer(2, 2, 2, (2, 2), bias=bias))
    ]


# -- against finite differences
# ----------------------------------------------------------------------------------------------------------

CHECKS = dict(check_forward_ad=True, check_batched_grad=True)
SECOND = dict(check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("applied", [False, True])
def test_operator(norm, applied):
    """F(x, u) with u different from x and with u = x, for an odd geometry."""
    x, *parameters = _tensors(bias=applied)
    u = torch.randn_like(x).requires_grad_() if applied else None
    output = lambda *t: align(t[0], t[1], *t[2:], *WINDOW, norm, 1e-6, False, "products", "factored")[0]
    tensors = (x, u, *parameters)
    assert torch.autograd.gradcheck(output, tensors, **CHECKS)
    assert torch.autograd.gradgradcheck(output, tensors, **SECOND)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer(norm, backend):
    layer = functools.partial(dau_conv2d, norm=norm, backend=backend)
    tensors = _tensors()
    assert torch.autograd.gradcheck(layer, tensors, **CHECKS)
    assert torch.autograd.gradgradcheck(layer, tensors, **SECOND)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adjoint(norm, backend):
    x, *parameters = _tensors()
    v = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    transpose = functools.partial(dau_conv2d_transpose, norm=norm, backend=backend)
    assert torch.autograd.gradcheck(transpose, (x, v, *parameters), **CHECKS)
    assert torch.autograd.gradgradcheck(transpose, (x, v, *parameters), **SECOND)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explanation_mode(backend):
    """In explanation mode the layer is a linear map of the image in forward and reverse mode. Its derivatives
    can be differentiated in full.
    """
    x, *parameters = _tensors()
    layer = lambda x, *p: dau_conv2d(x, *p, backend=backend, detach=True)
    tangent, value = torch.randn_like(x), torch.randn(1, 2, 2, 2, dtype=torch.float64)
    row = vjp(lambda x: layer(x, *parameters), x)[1](value)[0]
    assert_close(row, dau_conv2d_transpose(x, value, *parameters, backend="reference"), 1e-12)
    directional = jvp(lambda x: layer(x, *parameters), (x,), (tangent,))[1]
    assert_close((directional * value).sum(), (row * tangent).sum(), 1e-12)
    # W(x) x is the output
    assert_close(jvp(lambda x: layer(x, *parameters), (x,), (x,))[1], layer(x, *parameters), 1e-12)
    moving = jvp(layer, (x, *parameters), (tangent, *map(torch.randn_like, parameters)))[1]
    assert_close(moving, directional, 1e-12)  # the parameters are constants
    rows = lambda x, *p: vjp(lambda y: layer(y, *p), x)[1](value)[0]
    assert torch.autograd.gradcheck(rows, (x, *parameters), check_forward_ad=True)


# -- against the reference backend
# ------------------------------------------------------------------------------------------------------


def _same(transformed, bound=1e-11):
    """Assert that ``transformed(backend)``, a tree of tensors, is the same for both backends."""
    ours, truth = (
        torch.utils._pytree.tree_leaves(transformed(backend)) for backend in ("factored", "reference")
    )
    assert len(ours) == len(truth) > 0
    for a, b in zip(ours, truth, strict=True):
        assert_close(a, b, bound)
        assert b.detach().abs().max() > 0


def _loss(backend, norm="squash", **options):
    return lambda *t: dau_conv2d(*t, norm=norm, backend=backend, **options).sin().sum()


@pytest.mark.parametrize("norm", NORMS)
def test_transforms_of_a_layer(norm):
    tensors = _tensors(grad=False, batch=2)
    everything = tuple(range(4))
    _same(lambda b: grad(_loss(b, norm), everything)(*tensors))
    _same(lambda b: jacrev(lambda *t: dau_conv2d(*t, norm=norm, backend=b), everything)(*tensors))
    _same(lambda b: jacfwd(lambda *t: dau_conv2d(*t, norm=norm, backend=b), everything)(*tensors))
    _same(lambda b: hessian(_loss(b, norm), (0, 2))(*tensors))
    _same(lambda b: jacrev(jacfwd(_loss(b, norm)))(*tensors))
    _same(lambda b: grad(lambda *t: grad(_loss(b, norm))(*t).square().sum(), everything)(*tensors))


def test_third_derivatives():
    tensors = [t[:, :1] if t.dim() == 4 else t[:, :, :1] for t in _tensors(grad=False)]
    tensors = [tensors[0][:, :, :2, :2], tensors[1], tensors[2], tensors[3][:, :1]]
    # torch fails at jacrev of a hessian of vector_norm
    truth = jacrev(jacrev(jacrev(_loss("reference"))))(*tensors)
    for outer, middle, inner in itertools.product((jacrev, jacfwd), repeat=3):
        assert_close(
            outer(middle(inner(_loss("factored"))))(*tensors), truth, 1e-10, f"{outer}, {middle}, {inner}"
        )


def test_third_derivatives_in_explanation_mode():
    """Derivatives of the map x -> W(x)^T v: its first derivative in v is constant, and its derivatives in x
    are those of the weights.
    """
    image, *parameters = _tensors(grad=False)
    row = lambda b: lambda x: grad(_loss(b, detach=True))(x, *parameters).sin().sum()
    for outer, inner in itertools.product((jacrev, jacfwd), repeat=2):
        _same(lambda b, o=outer, i=inner: o(i(row(b)))(image), 1e-10)


def test_around_torch_autograd():
    """torch.func within a graph of torch.autograd, with no_grad around it and inside it."""
    image, *parameters = _tensors(grad=False)
    leaf = image.clone().requires_grad_()

    def mixed(backend):
        inner = grad(_loss(backend))(leaf, *parameters)
        return torch.autograd.grad(inner.square().sum(), leaf)[0]

    _same(mixed)

    def constant(backend):
        def loss(x):
            with torch.no_grad():
                y = dau_conv2d(x, *parameters, backend=backend)
            return (y * x.sum()).sum()

        return grad(loss)(image)

    _same(constant)
    with torch.no_grad():
        inner = grad(_loss("factored"))(leaf, *parameters)
    assert not inner.requires_grad
    assert grad(_loss("factored"))(leaf, *parameters).requires_grad


def test_gradients_of_each_sample():
    """vmap of grad gives the gradients of a loop over the samples."""
    net = coda_fast.CoDANet(
        [3, 4], ranks=[3, 3], kernel_sizes=[3, 1], strides=[2, 1], temperature=1.0, dtype=torch.float64
    )
    images, labels = torch.rand(3, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 1])
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, image, label):
        return nn.functional.cross_entropy(functional_call(net, parameters, (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for i in range(3):
        expected = torch.autograd.grad(
            nn.functional.cross_entropy(net(images[i : i + 1]), labels[i : i + 1]), list(net.parameters())
        )
        for name, gradient in zip(parameters, expected, strict=True):
            assert_close(found[name][i], gradient, 1e-12)


def test_an_ensemble():
    """Parameters are stacked and batched (stack_module_state), the images are not."""
    nets = [coda_fast.create_model("coda_xs_digits", dtype=torch.float64) for _ in range(3)]
    parameters, buffers = stack_module_state(nets)
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    found = vmap(lambda p, b, x: functional_call(nets[0], (p, b), (x,)), in_dims=(0, 0, None))(
        parameters, buffers, images
    )
    assert_close(found, torch.stack([net(images) for net in nets]), 1e-12)


@pytest.mark.parametrize("explaining", [False, True])
def test_network(explaining):
    """Jacobians in both modes and their products, in explanation mode and without. The reference network has
    the same weights and layers of the reference backend.
    """
    nets = {}
    for backend in BACKENDS:
        torch.manual_seed(3)
        options = dict(temperature=1.0, dtype=torch.float64, backend=backend)
        nets[backend] = coda_fast.CoDANet(
            [3, 2], ranks=[3, 3], kernel_sizes=[3, 1], strides=[2, 1], **options
        )
    encoded, tangent = torch.rand(2, 1, 6, 4, 4, dtype=torch.float64)

    def logits(backend):
        net = nets[backend]
        return lambda x: net.head(net.run_layers(x))

    def inside(transformed):
        def call(backend):
            if not explaining:
                return transformed(backend)
            with nets[backend].explanation_mode():
                return transformed(backend)

        return call

    _same(inside(lambda b: jacrev(logits(b))(encoded)))
    _same(inside(lambda b: jacfwd(logits(b))(encoded)))
    _same(inside(lambda b: jvp(logits(b), (encoded,), (tangent,))))
    _same(inside(lambda b: hessian(lambda x: logits(b)(x).sin().sum())(encoded)))
    forward, reverse = (inside(lambda b, j=j: j(logits(b))(encoded))("factored") for j in (jacfwd, jacrev))
    assert_close(forward, reverse, 1e-12)
    if explaining:  # the Jacobian is the global linear map
        with nets["factored"].explanation_mode():
            found = (forward[0] * encoded).sum((1, 2, 3, 4)) + nets["factored"].logit_bias
        assert_close(found, logits("factored")(encoded)[0], 1e-12)


def test_forward_mode_of_a_module():
    """torch.autograd.forward_ad: a dual image through a network equals finite differences."""
    net = coda_fast.create_model("coda_xs_digits", dtype=torch.float64)
    images, tangent = torch.rand(2, 2, 1, 8, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(images, tangent))).tangent
    step = 1e-6
    assert_close(found, (net(images + step * tangent) - net(images - step * tangent)) / (2 * step), 1e-7)


def test_forward_mode_where_a_weight_vanishes():
    """At w = 0 the directional derivative of "squash" is zero and not NaN; so is that of "l2" below eps."""
    image = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    reduce, weight = (
        torch.randn(2, 2, 2, 2, dtype=torch.float64),
        torch.zeros(2, 2, 2, 2, 2, dtype=torch.float64),
    )
    for backend in BACKENDS:
        rows = lambda x, b=backend: dau_conv2d(x, reduce, weight, backend=b).sum()
        output, tangent = jvp(
            lambda x, b=backend: dau_conv2d(x, reduce, weight, backend=b), (image,), (torch.ones_like(image),)
        )
        assert not output.any()
        assert not tangent.any()
        assert not hessian(rows)(image).any()
        assert not jacrev(jacrev(rows))(image).any()


@pytest.mark.parametrize("backend", ["factored", "triton"])
def test_fused_backends(backend):
    """The derivatives are registered for all backends: each gives them in float32, including the fused
    kernels.
    """
    torch.manual_seed(0)
    tensors = [t.float() for t in _tensors(grad=False)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    truth = grad(_loss("reference"), (0, 1, 2, 3))(*(t.double() for t in tensors))
    found = grad(_loss(backend), (0, 1, 2, 3))(*(t.to(device) for t in tensors))
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b, 1e-4)
    tangents = [torch.randn_like(t) for t in tensors]
    truth = jvp(_loss("reference"), tuple(t.double() for t in tensors), tuple(t.double() for t in tangents))[
        1
    ]
    found = jvp(_loss(backend), tuple(t.to(device) for t in tensors), tuple(t.to(device) for t in tangents))[
        1
    ]
    assert_close(found, truth, 1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype, norm):
    """Short weights, whose powers underflow in float16: the directional derivative and a second derivative
    are exact within the rounding of the dtype.
    """
    tensors = [t.to(dtype) for t in _tensors(grad=False)]
    tensors[2:] = [t / 64 for t in tensors[2:]]
    tangents = [torch.randn_like(t) for t in tensors]
    layer = functools.partial(dau_conv2d, norm=norm)
    found = jvp(layer, tuple(tensors), tuple(tangents))[1]
    truth = jvp(layer, tuple(t.double() for t in tensors), tuple(t.double() for t in tangents))[1]
    assert found.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps
    assert_close(found, truth, bound)
    second = lambda *t: grad(lambda x: grad(lambda x: layer(x, *t[1:]).sum())(x).sum())(t[0])
    assert_close(second(*tensors), second(*(t.double() for t in tensors)), 8 * bound)
