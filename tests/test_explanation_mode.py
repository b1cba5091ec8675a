"""Explanation mode is a property of a call: concurrent, earlier and later code is not affected."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from support import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import coda_fast
from coda_fast import DAUConv2d, explanation_mode


def _network():
    torch.manual_seed(1)
    options = dict(temperature=2.0, dtype=torch.float64)
    return coda_fast.CoDANet([4, 6, 3], ranks=[3, 4, 4], kernel_sizes=[3, 3, 1], strides=[1, 2, 1], **options)


def _images(count=2, seed=0):
    return torch.rand(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _input_gradient(call, images, backward=contextlib.nullcontext):
    """The gradient of the sum of the first logit in the images. ``backward``: a context for the backward pass
    alone.
    """
    images = images.clone().requires_grad_()
    total = call(images)[:, 0].sum()
    with backward():
        return torch.autograd.grad(total, images)[0]


def _explained(net, images):
    with explanation_mode(net):
        return _input_gradient(net, images)


@pytest.fixture
def case():
    """(network, images, gradient in explanation mode, gradient without)."""
    net, images = _network(), _images()
    explained, plain = _explained(net, images), _input_gradient(net, images)
    assert not torch.allclose(explained, plain, rtol=1e-2), (
        "the gradients of the two modes must differ, or the tests below would show nothing"
    )
    return net, images, explained, plain


def _nothing_left(net):
    assert not any(layer.explaining for layer in net.modules() if isinstance(layer, DAUConv2d))


def _training_step(net):
    images, labels = _images(4, seed=3), torch.tensor([0, 1, 2, 1])
    loss = F.binary_cross_entropy_with_logits(net(images), F.one_hot(labels, 3).double())
    return torch.autograd.grad(loss, list(net.parameters()))


# -- threads
# ------------------------------------------------------------------------------------------------------------


def test_explained_in_eight_threads_while_it_trains():
    """100 explanations in each of 8 threads equal those of a single thread, and so does every concurrent
    training step.
    """
    net = _network()
    expected = [net.explain(_images(1, seed), seed % 3) for seed in range(8)]
    gradients = _training_step(net)
    begin, over = threading.Barrier(9), threading.Event()

    def explain(seed):
        begin.wait()
        images = _images(1, seed)
        found = [net.explain(images, seed % 3) for _ in range(100)]
        return all(torch.equal(e.contribution_map, expected[seed].contribution_map) for e in found), float(
            max(e.completeness_error.max() for e in found)
        )

    def train():
        begin.wait()
        steps = []
        while not over.is_set():
            steps.append(all(torch.equal(a, b) for a, b in zip(_training_step(net), gradients, strict=True)))
        return steps

    with ThreadPoolExecutor(9) as pool:
        training = pool.submit(train)
        results = list(pool.map(explain, range(8)))
        over.set()
        steps = training.result()
    assert all(same for same, _ in results)
    assert max(error for _, error in results) < 1e-13
    assert len(steps) > 5
    assert all(steps), f"{steps.count(False)} of {len(steps)} training steps had other gradients"
    _nothing_left(net)
    assert all(torch.equal(a, b) for a, b in zip(_training_step(net), gradients, strict=True))


def test_a_thread_that_begins_within_the_mode_is_not_in_it(case):
    net, images, explained, plain = case
    if getattr(sys.flags, "thread_inherit_context", 0):
        pytest.skip("this Python lets threads inherit the context that they are made in")
    with explanation_mode(net), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(_input_gradient, net, images).result(), plain)
        assert torch.equal(_input_gradient(net, images), explained)


def test_the_backward_pass_may_run_in_another_thread(case):
    net, images, explained, _ = case
    leaf = images.clone().requires_grad_()
    with explanation_mode(net):
        total = net(leaf)[:, 0].sum()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: torch.autograd.grad(total, leaf)[0]).result(), explained)


def test_replicas_of_data_parallel(case):
    """``torch.nn.DataParallel`` makes replicas of each module in the caller's thread, and calls them in other
    threads.
    """
    net, images, explained, plain = case

    def replicated(layer):
        return layer._replicate_for_data_parallel()

    class Replica:
        """What ``torch.nn.parallel.replicate`` builds, which accepts GPUs only: replicas of all modules that
        share the parameters.
        """

        def __init__(self, net):
            self.net, self.layers = net, []
            for layer in net.layers:
                replica = replicated(layer)
                for name, parameter in layer.named_parameters(recurse=False):
                    setattr(replica, name, parameter.view_as(parameter))
                self.layers.append(replica)

        def __call__(self, images):
            x = self.net.encoder(images)
            for layer in self.layers:
                x = layer(x)
            return self.net.head(x)

    with ThreadPoolExecutor(1) as pool:
        with explanation_mode(net):
            replica = Replica(net)
        assert_close(pool.submit(_input_gradient, replica, images).result(), explained, 1e-14)
        assert_close(pool.submit(_input_gradient, Replica(net), images).result(), plain, 1e-14)
    _nothing_left(net)


# -- generators and tasks
# ------------------------------------------------------------------------------------------------------------


def _gradients(net, images):
    with explanation_mode(net):
        while True:
            yield _input_gradient(net, images)


def test_generators_that_end_in_any_order(case):
    net, images, explained, plain = case
    first, second, forgotten = (_gradients(net, images) for _ in range(3))
    for generator in (first, second, forgotten):
        assert torch.equal(next(generator), explained)
    first.close()
    assert torch.equal(next(second), explained)
    second.close()
    del generator, forgotten
    gc.collect()
    _nothing_left(net)
    assert torch.equal(_input_gradient(net, images), plain)


def test_tasks_of_asyncio_that_take_turns(case):
    net, images, explained, plain = case

    async def explain():
        with explanation_mode(net):
            for _ in range(3):
                assert torch.equal(_input_gradient(net, images), explained)
                await asyncio.sleep(0)

    async def train():
        for _ in range(3):
            assert torch.equal(_input_gradient(net, images), plain)
            await asyncio.sleep(0)

    async def together():
        await asyncio.gather(explain(), train(), explain(), train())

    asyncio.run(together())
    _nothing_left(net)


def test_an_asynchronous_generator_that_is_left_early(case):
    """The event loop closes the generator in another task, whose context is not that of its start."""
    net, images, explained, plain = case

    async def gradients():
        with explanation_mode(net):
            while True:
                yield _input_gradient(net, images)

    async def run():
        async for gradient in gradients():
            assert torch.equal(gradient, explained)
            break
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)  # lets the event loop run
        _nothing_left(net)
        assert torch.equal(_input_gradient(net, images), plain)

    asyncio.run(run())


# -- recomputed segments
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "backend", "save_contraction"),
    [
        ("outside", "factored", False),
        ("inside", "factored", False),
        ("another thread", "factored", False),
        ("outside", "triton", True),
    ],
)
def test_a_checkpointed_segment_that_is_recomputed(where, backend, save_contraction):
    net, images = _network(), _images()
    if backend == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        net, images = net.float().to(device), images.float().to(device)
    for layer in net.layers:
        layer.backend, layer.save_contraction = backend, save_contraction
    explained = _explained(net, images)

    def call(x):
        x = net.encoder(x)
        for layer in net.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return net.head(x)

    leaf = images.clone().requires_grad_()
    with explanation_mode(net):
        total = call(leaf)[:, 0].sum()
        if where == "inside":
            found = torch.autograd.grad(total, leaf)[0]
    if where == "outside":
        found = torch.autograd.grad(total, leaf)[0]
    if where == "another thread":
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(lambda: torch.autograd.grad(total, leaf)[0]).result()
    assert torch.equal(found, explained)
    # and vice versa: a segment of training that is recomputed in explanation mode
    total = call(leaf)[:, 0].sum()
    with explanation_mode(net):
        found = torch.autograd.grad(total, leaf)[0]
    assert torch.equal(found, _input_gradient(net, images))


def test_a_reentrant_checkpoint_is_refused_in_the_mode_and_trains_without(case):
    net, images, _, plain = case
    segment = lambda x: checkpoint(net, x, use_reentrant=True)
    with (
        explanation_mode(net),
        pytest.raises(RuntimeError, match="expected torch.utils.checkpoint with use_reentrant=False"),
    ):
        segment(images.clone().requires_grad_())
    with explanation_mode(net), torch.no_grad():
        net(images)  # without a graph nothing is checkpointed, and nothing fails
    leaf = images.clone().requires_grad_()
    segment(leaf)[:, 0].sum().backward()
    assert torch.equal(leaf.grad, plain)


# -- copies and wrappers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_are_networks_of_their_own(case, duplicate):
    net, images, explained, plain = case
    with explanation_mode(net):
        within = duplicate(net)
        assert torch.equal(_input_gradient(within, images), plain)
        assert torch.equal(_input_gradient(net, images), explained)
    with explanation_mode(duplicate(net)):
        assert torch.equal(_input_gradient(net, images), plain)
    assert torch.equal(_explained(within, images), explained)


def test_through_wrappers(case):
    net, images, explained, _ = case
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    for wrapper in (nn.DataParallel(net), nn.Sequential(nn.Identity(), net), averaged):
        assert_close(_explained(wrapper, images), explained, 1e-14)
        _nothing_left(wrapper)


def test_fully_sharded(tmp_path):
    """FSDP2 with one process: parameters are sharded, and gathered by hooks that run in explanation mode as
    in any call.
    """
    program = """
    import sys
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    import coda_fast
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    net = coda_fast.create_model("coda_xs_digits", dtype=torch.float64)
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    def gradient():
        leaf = images.clone().requires_grad_()
        total = net(leaf)[:, 0].sum()
        total.backward()
        return leaf.grad
    with coda_fast.explanation_mode(net):
        explained = gradient()
    plain = gradient()
    net.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    with coda_fast.explanation_mode(net):
        within = gradient()
    assert torch.equal(within, explained)
    assert torch.equal(gradient(), plain)
    assert not torch.allclose(explained, plain)
    assert all(p.grad is not None for p in net.parameters())
    dist.destroy_process_group()
    print("done")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout.strip().endswith("done"), run.stderr[-2000:]


# -- compiled and exported
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_one_graph_for_each_mode(case, counter):
    """Each mode compiles once, whichever comes first and whatever other networks are explained. The mode is
    read when the network is called.
    """
    net, images, explained, plain = case
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    other = _network()
    for _ in range(3):
        assert_close(_explained(compiled, images), explained, 1e-12)
        assert_close(_input_gradient(compiled, images), plain, 1e-12)
        with explanation_mode(net):
            assert_close(_input_gradient(compiled, images), explained, 1e-12)
        assert counter.frame_count == 2
    for _ in range(2):
        with explanation_mode(other):
            assert_close(_input_gradient(compiled, images), plain, 1e-12)
    assert counter.frame_count == 3


# Compilation sets a flag of the whole process: while one thread compiles, the others must continue without
# compiled code, and not fail. Torch's guards occasionally fail when several threads evaluate them at once,
# which causes recompilations, whose number does not matter here.
@torch._dynamo.config.patch(
    error_on_nested_fx_trace=False, recompile_limit=1000, accumulated_recompile_limit=1000
)
def test_compiled_in_threads(case, counter):
    net, images, explained, plain = case
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    _explained(compiled, images), _input_gradient(compiled, images)
    begin = threading.Barrier(4)

    def repeat(explains):
        begin.wait()
        expected = explained if explains else plain
        call = (
            (lambda: _explained(compiled, images))
            if explains
            else (lambda: _input_gradient(compiled, images))
        )
        return [float((call() - expected).abs().max()) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        # since torch 2.14, settings belong to a context that threads do not inherit
        found = [
            pool.submit(contextvars.copy_context().run, repeat, explains)
            for explains in (True, False, True, False)
        ]
        assert max(error for errors in found for error in errors.result()) < 1e-12


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="torch.compile of torch before 2.14 cannot read context variables: compiled code sees the mode of "
    "its thread",
)
def test_compiled_in_tasks_of_asyncio(case, counter):
    net, images, explained, plain = case
    compiled = torch.compile(net, backend=counter, fullgraph=True)

    async def explain():
        with explanation_mode(net):
            for _ in range(3):
                assert_close(_input_gradient(compiled, images), explained, 1e-12)
                await asyncio.sleep(0)

    async def train():
        for _ in range(3):
            assert_close(_input_gradient(compiled, images), plain, 1e-12)
            await asyncio.sleep(0)

    async def together():
        await asyncio.gather(explain(), train())

    asyncio.run(together())


def test_entered_by_compiled_code(case, counter):
    net, images, explained, plain = case

    def both(x):
        with explanation_mode(net):
            within = net(x)
        return torch.cat((within, net(x)))

    compiled = torch.compile(both, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_close(_input_gradient(compiled, images), explained + plain, 1e-12)
        _nothing_left(net)
    assert counter.frame_count == 1


def test_exported_in_the_mode_it_was_captured_in(case):
    """An exported program computes what it was captured to compute: the mode of the caller does not change
    it.
    """
    net, images, explained, plain = case
    with explanation_mode(net):
        explaining = torch.export.export(net, (images,))
    training = torch.export.export(net, (images,))
    for program, expected in ((explaining, explained), (training, plain)):
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        module = torch.export.load(file).module()
        assert_close(_input_gradient(module, images), expected, 1e-13)
        with explanation_mode(net):
            assert_close(_input_gradient(module, images), expected, 1e-13)
