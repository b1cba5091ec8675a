"""A DAU layer can be used like a convolution, in all the ways in which modules are used. docs/uses.md has a
row for each test.
"""

import copy
import io
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import assert_close
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import coda_fast
from coda_fast import DAUConv2d

ROOT = Path(__file__).parent.parent


def _layer(**options):
    torch.manual_seed(0)
    return DAUConv2d(3, 5, 3, padding=1, rank=4, dtype=torch.float64, **options)


def _network():
    torch.manual_seed(0)
    return coda_fast.CoDANet(
        [4, 3], ranks=[3, 4], kernel_sizes=[3, 1], strides=[1, 1], temperature=1.0, dtype=torch.float64
    )


def _images(batch=2):
    return torch.rand(batch, 3, 6, 6, dtype=torch.float64)


# -- the page
# ------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_page_names_a_test_that_is_there():
    text = (ROOT / "docs" / "uses.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\|$", text, re.MULTILINE)[2:]
    named = [re.findall(r"`(test\w*(?:/\w+)*)\.py::(test_\w+)`", row) for row in rows]
    assert all(named), [row for row, names in zip(rows, named, strict=True) if not names]
    for file, name in (pair for names in named for pair in names):
        path = ROOT / "tests" / f"{file}.py" if not file.startswith("tests/") else ROOT / f"{file}.py"
        assert f"def {name}(" in path.read_text(encoding="utf-8"), f"{file}::{name}"
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)) - {
        "test_every_row_of_the_page_names_a_test_that_is_there"
    }
    assert here <= {name for names in named for _, name in names}


# -- modules
# ------------------------------------------------------------------------------------------------------------


def test_hooks():
    layer, seen = _layer(), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(
        lambda module, grad_input, grad_output: seen.append(grad_output[0].shape)
    )
    layer.weight.register_hook(lambda grad: seen.append(grad.shape))
    layer(_images().requires_grad_()).sum().backward()
    assert seen[:2] == [(2, 3, 6, 6), (2, 5, 6, 6)]
    # the order of the backward hooks is up to torch
    assert sorted(seen[2:]) == [(2, 5, 6, 6), (5, 4, 3, 3, 3)]


@pytest.mark.parametrize("name", ["reduction_weight", "weight"])
def test_parametrizations(name):
    """With weight or spectral normalisation the layer computes with the parametrised tensor, and trains."""
    for add in (parametrizations.weight_norm, parametrizations.spectral_norm):
        # spectral normalisation continues its power iteration in training mode
        layer = add(_layer(), name).eval()
        x = _images()
        expected = coda_fast.functional.dau_conv2d(
            x, layer.reduction_weight, layer.weight, layer.bias, padding=1, backend="reference"
        )
        assert_close(layer(x), expected, 1e-12)
        layer(x).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
        parametrize.remove_parametrizations(layer, name)
        assert_close(layer(x), expected, 1e-12)


def test_pruning():
    layer = _layer()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    x, mask = _images(), layer.weight_mask
    expected = coda_fast.functional.dau_conv2d(
        x, layer.reduction_weight, layer.weight_orig * mask, layer.bias, padding=1
    )
    assert_close(layer(x), expected, 1e-14)
    layer(x).sum().backward()
    assert not layer.weight_orig.grad[mask == 0].any()
    assert layer.weight_orig.grad[mask == 1].any()
    prune.remove(layer, "weight")
    assert_close(layer(x), expected, 1e-14)


def test_meta_device_and_to_empty():
    """A layer created on the meta device gets memory, and its weights are drawn as by the constructor."""
    layer = DAUConv2d(3, 5, 3, rank=4, device="meta")
    assert layer(torch.empty(2, 3, 6, 6, device="meta")).shape == (2, 5, 4, 4)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.rand(2, 3, 6, 6)).abs().max() > 0
    skipped = nn.utils.skip_init(DAUConv2d, 3, 5, 3, rank=4)
    assert skipped.weight.shape == (5, 4, 3, 3, 3)


def test_whole_modules_as_files():
    """torch.save of a whole module, which uses pickle."""
    net, file = _network(), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    x = _images()
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))


def _square_sum(net, x, queue):
    queue.put(float(net(x).detach().square().sum()))


def test_shared_memory_and_processes():
    """A network in shared memory is used in a spawned process."""
    net, x = _network().share_memory(), _images()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_square_sum, args=(net, x, queue))
    process.start()
    assert queue.get(timeout=120) == pytest.approx(float(net(x).detach().square().sum()), rel=1e-12)
    process.join()


def test_tied_layers():
    """One layer used twice: the gradients of both uses add up."""
    layer = DAUConv2d(3, 3, 3, padding=1, rank=4, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    x = _images()
    nn.Sequential(layer, layer)(x).sum().backward()
    first = twin(x)
    split = [torch.autograd.grad(f.sum(), twin.weight, retain_graph=True)[0] for f in (twin(first.detach()),)]
    through = torch.autograd.grad(_frozen(twin, first).sum(), twin.weight)[0]
    assert_close(layer.weight.grad, split[0] + through, 1e-12)


def _frozen(layer, x):
    """The layer with its parameters as constants."""
    return functional_call(layer, {name: p.detach() for name, p in layer.named_parameters()}, (x,))


def test_frozen_parameters():
    """Parameters with requires_grad_(False) have no gradient, and those of the others do not change."""
    layer, x = _layer(), _images().requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.reduction_weight])
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
    found = torch.autograd.grad(layer(x).sum(), [x, layer.reduction_weight])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad


def test_inference_mode_and_no_grad():
    layer, x = _layer(), _images()
    expected = layer(x).detach()
    with torch.inference_mode():
        assert layer(x).is_inference()
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert not layer(x).requires_grad
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam]
)
@pytest.mark.parametrize("foreach", [False, True])
def test_optimisers(make, foreach):
    net, x, labels = _network(), _images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = make(net.parameters(), lr=1e-2, foreach=foreach)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_second_order_optimisers():
    """LBFGS, which calls the network from a closure."""
    net, x, labels = _network(), _images(3), torch.tensor([0, 1, 2])
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        return loss

    before = float(optimizer.step(closure).detach())
    assert float(closure().detach()) < before


# -- compiled, traced
# ------------------------------------------------------------------------------------------------------------


def _swapped(net, state):
    """Each way to give a network other weights, as (its name, a function that does it)."""

    def in_place():
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(state[name])

    def exchange():
        for parameter, other in zip(net.parameters(), state.values(), strict=True):
            parameter.data = other.clone()

    return {
        "copied in place": in_place,
        "load_state_dict": lambda: net.load_state_dict(state),
        "load_state_dict, assigned": lambda: net.load_state_dict(
            {k: v.clone() for k, v in state.items()}, assign=True
        ),
        "data exchanged": exchange,
    }


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_swapped_between_calls_of_a_compiled_network(backend, monkeypatch, tmp_path):
    """Each call computes with the current weights, also when an average of the weights is evaluated in their
    place.

    This also holds if ``CI`` is set: Inductor then refuses operators that have a decomposition in torch,
    unless they are registered as exceptions.
    """
    monkeypatch.setenv("CI", "true")
    # an empty cache, so that everything is compiled
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, other = _images(), {name: t + 0.1 * torch.rand_like(t) for name, t in _network().state_dict().items()}
    torch._dynamo.reset()
    truth = _network()
    truth.load_state_dict(other)
    for name in _swapped(truth, other):
        net = _network()
        compiled = torch.compile(net, backend=backend)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert_close(compiled(x), _network()(x), 1e-12, name)
                _swapped(net, other)[name]()
                assert_close(compiled(x), truth(x), 1e-12, name)
                _swapped(net, _network().state_dict())[name]()
                assert_close(compiled(x), _network()(x), 1e-12, name)
    found = functional_call(net, other, (x,))
    assert_close(found, truth(x), 1e-12)
    assert_close(
        torch.compile(lambda p, x: functional_call(net, p, (x,)), backend=backend)(other, x), truth(x), 1e-12
    )
    averaged = torch.optim.swa_utils.AveragedModel(net)
    evaluated = torch.compile(averaged, backend=backend)
    for state in (net.state_dict(), other):
        net.load_state_dict(state)
        averaged.update_parameters(net)
        assert_close(evaluated(x), copy.deepcopy(averaged.module)(x), 1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gradients_accumulated_over_forward_passes_of_a_compiled_network(device, mode):
    """Several forward passes before the first backward pass, over several steps: tensors saved by one pass
    are not overwritten by the next. With "reduce-overhead" a GPU replays CUDA graphs, which own their memory.
    """
    torch._dynamo.reset()
    net = _network().float().to(device)
    compiled = torch.compile(net, mode=mode)
    parts = [torch.rand(2, 3, 6, 6, device=device) for _ in range(3)]
    for step in range(4):
        net.zero_grad()
        losses = [compiled(x).square().sum() for x in parts]
        sum(losses).backward() if step % 2 else [loss.backward() for loss in losses]
        found = [p.grad.clone() for p in net.parameters()]
        expected = torch.autograd.grad(sum(net(x).square().sum() for x in parts), list(net.parameters()))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 1e-4)
    torch._dynamo.reset()


def test_symbolic_trace_of_torch_fx():
    """A layer is a leaf, as nn.Conv2d is. Explanation mode is read when the traced module is called."""
    net, x = _network(), _images()
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "layers.0",
        "layers.1",
    ]
    assert torch.equal(traced(x), net(x))
    leaf = x.clone().requires_grad_()
    with coda_fast.explanation_mode(traced):
        found = torch.autograd.grad(traced(leaf)[:, 0].sum(), leaf)[0]
    with coda_fast.explanation_mode(net):
        assert torch.equal(found, torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)[0])
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(net, nn.Sigmoid()))(x), net(x).sigmoid())
    with pytest.raises(TypeError, match="got the layer itself, which is a leaf"):
        torch.fx.symbolic_trace(_layer())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_trace_of_torch_jit():
    net, file = _network(), io.BytesIO()
    traced = torch.jit.trace(net, _images())
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in (2, 5):
        x = _images(batch).requires_grad_()
        assert_close(loaded(x), net(x), 1e-14)
        found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (loaded, net))
        assert_close(found, expected, 1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_script_of_torch_jit_is_refused():
    with pytest.raises(
        TypeError, match=r"torch.jit.script: expected torch.jit.trace, torch.export or torch.compile"
    ):
        torch.jit.script(_layer())


# -- refused
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(2, 3, 6, 6, dtype=torch.complex64),
            "input: expected a floating-point tensor, got torch.complex64",
        ),
        (
            torch.zeros(2, 3, 6, 6, dtype=torch.uint8),
            "input: expected a floating-point tensor, got torch.uint8",
        ),
        (
            torch.zeros(2, 3, 6, 6, dtype=torch.float64).to_sparse(),
            "input: expected a dense tensor, got torch.sparse_coo",
        ),
        (torch.zeros(2, 3, 6, 6).to_mkldnn(), "input: expected a dense tensor, got torch._mkldnn"),
        (
            lambda: torch.nested.nested_tensor([torch.zeros(3, 6, 6)], layout=torch.strided),
            "input: expected a dense tensor, got a nested one",
        ),
        (
            torch.zeros(3, 6, dtype=torch.float64),
            r"input: expected \[N, 3, H, W\] or \[3, H, W\], got shape \[3, 6\]",
        ),
        (torch.zeros(2, 3, 0, 6, dtype=torch.float64), "the kernel does not fit|expected"),
    ],
    ids=["complex", "integer", "sparse", "mkldnn", "nested", "two dimensions", "no rows"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_refused(tensor, message):
    layer = DAUConv2d(3, 5, 3, rank=4, dtype=torch.float64)
    tensor = tensor() if callable(tensor) else tensor
    with pytest.raises((TypeError, ValueError), match=message):
        layer(tensor)


def test_empty_batches():
    layer, x = _layer(), torch.zeros(0, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert output.shape == (0, 5, 6, 6)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in layer.parameters())
