"""DAUConv2d as a drop-in module, its initialisation, and explanation mode."""

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coda_fast
from coda_fast import AddInverse, DAUConv2d, SumPool2d, explanation_mode


def test_signature_begins_like_conv2d():
    conv = list(inspect.signature(nn.Conv2d.__init__).parameters.values())
    ours = list(inspect.signature(DAUConv2d.__init__).parameters.values())[: len(conv)]
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in conv]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((3, 8, 3), {}),
        ((3, 8, (3, 1), 2, (1, 0)), {}),
        ((3, 8, 3, 1, 2, 2, 1, False, "zeros"), {}),
        ((3, 8, 4), dict(padding="same")),
        ((3, 8, 3, 2, 1, 1, 1, True, "zeros", "cpu", torch.float64), {}),
    ],
    ids=str,
)
def test_takes_the_place_of_conv2d(arguments, options):
    conv, ours = nn.Conv2d(*arguments, **options), DAUConv2d(*arguments, **options)
    dtype = conv.weight.dtype
    x = torch.rand(2, 3, 9, 8, dtype=dtype)
    assert ours(x).shape == conv(x).shape
    assert ours(x).dtype == dtype
    assert ours(x[0]).shape == conv(x[0]).shape
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "dilation",
        "groups",
        "padding",
        "padding_mode",
    ):
        assert getattr(ours, name) == getattr(conv, name), name
    assert (ours.bias is None) == (conv.bias is None)


def test_parameters():
    layer = DAUConv2d(3, 8, (3, 2), rank=5)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"reduction_weight": (5, 3, 3, 2), "weight": (8, 5, 3, 3, 2), "bias": (8, 3, 3, 2)}
    assert DAUConv2d(3, 8, 3, bias=False).bias is None
    assert "bias" not in DAUConv2d(3, 8, 3, bias=False).state_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(groups=3), ValueError, "groups: DAUConv2d supports 1 only"),
        (dict(padding_mode="reflect"), ValueError, 'padding_mode: DAUConv2d supports "zeros" only.*reflect'),
        (dict(rank=0), ValueError, "rank: expected an int of at least 1, got 0"),
        (dict(in_channels=0), ValueError, "in_channels"),
        (dict(out_channels=2.0), ValueError, "out_channels"),
        (dict(norm="l3"), ValueError, "norm: expected one of"),
        (dict(norm="l2", eps=-1.0), ValueError, "eps: expected a positive"),
        (dict(backend="tpu"), ValueError, "backend: expected one of"),
        (dict(kernel_size=0), ValueError, "kernel_size: expected at least 1"),
        (dict(kernel_size="3"), TypeError, "kernel_size: expected an int or a pair"),
        (dict(padding="same", stride=2), ValueError, "stride 1"),
        (dict(output_padding=1), TypeError, "output_padding"),
    ],
    ids=str,
)
def test_refuses_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        DAUConv2d(**(dict(in_channels=3, out_channels=3, kernel_size=3) | options))


def test_repr_copy_and_state_dict():
    layer = DAUConv2d(3, 8, 3, padding=1, rank=4, norm="l2")
    assert (
        repr(layer) == "DAUConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), rank=4, padding=(1, 1), norm='l2')"
    )
    assert repr(DAUConv2d(3, 8, 1, rank=4, save_contraction=True)).endswith("rank=4, save_contraction=True)")
    twin = copy.deepcopy(layer)
    fresh = DAUConv2d(3, 8, 3, padding=1, rank=4, norm="l2")
    fresh.load_state_dict(layer.state_dict())
    x = torch.rand(1, 3, 5, 5)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(fresh(x), layer(x))


def test_on_the_meta_device():
    layer = DAUConv2d(3, 8, 3, device="meta")
    assert layer.weight.device.type == "meta"


def test_inside_an_existing_network():
    """Convolutions of a network written for nn.Conv2d are replaced one by one, and the network trains."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 16, 2)
    )
    for i, child in enumerate(net):
        if isinstance(child, nn.Conv2d):
            net[i] = DAUConv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, rank=4
            )
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
    x[y == 1, 0] *= 0.3
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def _response_and_gradient(initialise=None):
    """Over the nine layers of S-CoDA (channels and ranks divided by 4): output RMS per layer, and the
    gradient relative to the weight of the first.
    """
    torch.manual_seed(0)
    model = coda_fast.create_model(
        "coda_s_cifar10",
        ranks=[8] * 2 + [16] * 7,
        out_channels=[8, 8, 16, 16, 16, 32, 32, 32, 10],
        temperature=64,
    )
    if initialise:
        for layer in model.layers:
            for tensor in layer.parameters():
                initialise(tensor)
    x, sizes = model.encoder(torch.rand(4, 3, 32, 32)), []
    for layer in model.layers:
        x = layer(x)
        sizes.append(float(x.detach().square().mean().sqrt()))
    F.binary_cross_entropy_with_logits(model.head(x), torch.zeros(4, 10)).backward()
    first = model.layers[0].weight
    return sizes, float(first.grad.norm() / first.detach().norm())


def test_initialisation_keeps_a_deep_stack_alive():
    """After nine layers the signal is within two orders of magnitude. With torch's fan-in rule, the
    alternative, it vanishes.
    """
    ours, our_gradient = _response_and_gradient()
    default, default_gradient = _response_and_gradient(lambda t: nn.init.kaiming_uniform_(t, a=5**0.5))
    assert ours[-1] > 1e-3, ours
    assert default[-1] < 1e-2 * ours[-1], default
    assert our_gradient > 50 * default_gradient
    assert max(ours) < 2


def test_initialisation_ranges():
    torch.manual_seed(0)
    layer = DAUConv2d(16, 8, 3, rank=25)
    for tensor, bound in ((layer.reduction_weight, (16 * 9) ** -0.5), (layer.weight, 0.2), (layer.bias, 0.2)):
        assert 0.95 * bound < float(tensor.detach().abs().max()) <= bound


def test_add_inverse_and_sum_pool():
    x = torch.rand(2, 3, 4, 5)
    encoded = AddInverse()(x)
    assert torch.equal(encoded, torch.cat([x, 1 - x], 1))
    assert torch.allclose(SumPool2d()(x), x.flatten(2).sum(2))


def test_explanation_mode_ends():
    net = nn.Sequential(DAUConv2d(2, 3, 1), nn.Sequential(DAUConv2d(3, 2, 1)))
    other = DAUConv2d(2, 2, 1)
    modes = lambda: [layer.explaining for layer in (net[0], net[1][0], other)]
    with explanation_mode(net[1]):
        assert modes() == [False, True, False]
        with explanation_mode(net) as inside:
            assert inside is net
            assert modes() == [True, True, False]
        assert modes() == [False, True, False]
    assert modes() == [False] * 3
    with pytest.raises(RuntimeError, match="stop"), explanation_mode(net):
        raise RuntimeError("stop")
    assert modes() == [False] * 3
    with (
        pytest.raises(ValueError, match="at least one DAUConv2d, got Linear"),
        explanation_mode(nn.Linear(1, 1)),
    ):
        pass


def test_matrix_regulariser_trains():
    """A penalty on the rows of the global linear map, differentiated through explanation mode, makes them
    sparser.
    """
    torch.manual_seed(0)
    model = coda_fast.CoDANet(
        [4, 3], ranks=[4, 4], kernel_sizes=[3, 3], strides=[1, 1], temperature=1, dtype=torch.float64
    )
    images = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sizes = []
    for _ in range(10):
        encoded = model.encoder(images).requires_grad_()
        with model.explanation_mode():
            logits = model.head(model.run_layers(encoded))
            (rows,) = torch.autograd.grad(logits[:, 0].sum(), encoded, create_graph=True)
        penalty = rows.abs().mean()
        optimizer.zero_grad()
        penalty.backward()
        assert all(
            p.grad is not None and p.grad.abs().max() > 0
            for n, p in model.named_parameters()
            if "layers.1" not in n
        )
        optimizer.step()
        sizes.append(float(penalty.detach()))
    assert sizes[-1] < 0.7 * sizes[0], sizes


def test_channels_last_and_half():
    """Module.to with a memory format and a dtype, as for a network of convolutions."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), DAUConv2d(4, 3, 3, rank=2))
    x = torch.rand(2, 3, 8, 8)
    before = net(x)
    net.to(memory_format=torch.channels_last)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[1].weight.shape == (3, 2, 4, 3, 3)
    assert torch.allclose(net(x.to(memory_format=torch.channels_last)), before, atol=1e-6)
    net.bfloat16()
    assert net(x.bfloat16()).dtype == torch.bfloat16
    net(x.bfloat16()).sum().backward()
    assert net[1].weight.grad.shape == net[1].weight.shape


def test_forward_on_the_meta_device():
    assert DAUConv2d(3, 8, 3, stride=2, device="meta")(torch.empty(2, 3, 9, 9, device="meta")).shape == (
        2,
        8,
        4,
        4,
    )


def test_numpy_ints_and_pairs_of_one():
    one = np.int64(1)
    layer = DAUConv2d(one * 3, one * 4, one * 3, one, (1,), rank=one * 2)
    assert layer(torch.rand(1, 3, 5, 5)).shape == (1, 4, 5, 5)
    assert all(
        type(n) is int for n in (layer.in_channels, layer.out_channels, layer.rank, *layer.kernel_size)
    )
