"""What Triton's interpreter cannot show of the kernels: compiled code, sizes past 2^31, streams, graphs,
memory, a second device.

tests/kernels/test_layer.py runs on the GPU too if there is one; this file has only the rest. In other
projects, three patterns of these kernels were silently miscompiled by some version of Triton or ptxas.
Therefore every shipped configuration is run and compared:

 -  8 warps in a loop over flattened taps: wrong results, https://github.com/pytorch/pytorch/issues/173068 and
   pull/177823
 -  wgmma with an operand from registers: a read-after-write hazard up to Triton 3.6,
    https://github.com/triton-lang/triton/issues/9433, fixed by pull/9514 and pull/8964
 -  masked asynchronous copies at image borders: the masked address is dereferenced,
   https://github.com/pytorch/pytorch/pull/187222
"""

import contextlib
import copy
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from support import random_layer
from support_kernels import DEVICE, L_LAYERS, S_LAYERS, compare, errors, grads_of, layer_tensors

from coda_fast import CoDANet
from coda_fast.functional import dau_conv2d
from coda_kernels import config, layer

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
S7 = (64, 64, 64, 3, 1)  # C, n, r, k, stride; its images are 8 x 8
LIMIT = 2**31


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fused(*tensors, **options):
    return dau_conv2d(*tensors, **options, backend="triton")


def same_bits(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def step_of(tensors, grad, **options):
    """A function that runs a training step and an explanation: [y, gradients of all tensors, explanation]."""

    def step():
        return [
            *grads_of(lambda *t: fused(*t, **options), tensors, grad),
            *explanation(tensors, grad, **options),
        ]

    return step


def explanation(tensors, grad, **options):
    return torch.autograd.grad(fused(*tensors, **options, detach=True), tensors[0], grad)


# -- more than 2^31 elements
# ------------------------------------------------------------------------------------------------------------


def check_large(case, size, batch, images, gib, **options):
    """Compare ``batch`` images with only some of them: forward, all gradients and explanation, with an
    upstream gradient that is zero for the other images.

    Both sums have the same terms that are not zero, so that they differ by the order of summation in float32
    and one rounding.
    """
    if DEVICE.type == "cuda" and (free := torch.cuda.mem_get_info()[0] / 2**30) < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")
    channels, units, rank, kernel = case
    images = sorted({min(max(0, i), batch - 1) for i in images})
    parameters = [
        t.to(DEVICE, torch.bfloat16).requires_grad_()
        for t in random_layer(channels, units, rank, (kernel, kernel))
    ]
    x = (
        torch.empty(batch, *size, channels, dtype=torch.bfloat16, device=DEVICE)
        .normal_()
        .permute(0, 3, 1, 2)
        .requires_grad_()
    )
    few = x.detach()[images].contiguous(memory_format=torch.channels_last).requires_grad_()
    for detach in (False, True):
        y_few = fused(few, *parameters, **options, detach=detach)
        grad_few = torch.randn_like(y_few)
        expected = torch.autograd.grad(y_few, [few] if detach else [few, *parameters], grad_few)
        y = fused(x, *parameters, **options, detach=detach)
        grad = torch.zeros_like(y)
        grad[images] = grad_few
        dx, *found = torch.autograd.grad(y, [x] if detach else [x, *parameters], grad)
        bound = torch.finfo(torch.bfloat16).eps
        for a, b in zip([y[images], dx[images], *found], [y_few, *expected], strict=True):
            assert max(errors(a, b)) <= bound
        dx[images] = 0
        assert not dx.any(), "the gradient of the other images must be zero"
        del y, grad, dx, found


def around(*positions):
    """The first and the last image, and the neighbours of each position."""
    return [0, 1, 1 << 40, *(i + shift for i in positions for shift in (-1, 0, 1))]


@pytest.mark.slow
def test_input_and_padded_image_beyond_the_limit():
    """x has 4100 x 8 x 256 x 256 elements, its padded copy has a border more, and the stride keeps the output
    small.
    """
    images = around(LIMIT // (8 * 256**2), LIMIT // (8 * 258**2))
    check_large((8, 4, 5, 3), (256, 256), 4100, images, gib=24, stride=4, padding=1)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [3, 1])
def test_outputs_beyond_the_limit(kernel):
    """P n > 2^31 for the output and the tensors kept for backward, in the contracted and in the generated
    form.
    """
    batch, pixels, units = 32_800, 32 * 32, 64
    rows = 16 + units  # of [dz | gs]
    last_unit = (LIMIT - (units - 1) * batch * pixels) // pixels  # where [n, P] passes the limit
    images = around(LIMIT // (pixels * units), LIMIT // (pixels * rows), last_unit)
    check_large((8, units, 5, kernel), (32, 32), batch, images, gib=64, padding=kernel // 2)


@pytest.mark.slow
def test_contraction_beyond_the_limit():
    """P n r > 2^31 for the contraction kept for backward."""
    images = around(LIMIT // (32 * 32 * 16 * 64))
    check_large((8, 16, 64, 3), (32, 32), 2052, images, gib=20, padding=1, save_contraction=True)


# -- the same bits
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "units", "rank", "size", "batch"), [(64, 64, 64, 8, 64), (64, 64, 256, 20, 4)]
)
def test_same_bits_twice(channels, units, rank, size, batch, monkeypatch):
    """Output, all gradients and explanation at real sizes, with sums split among programs, are the same bits
    twice and on two streams at once.
    """
    splits, parts = config.splits, []
    monkeypatch.setattr(config, "splits", lambda *args: parts.append(splits(*args)) or parts[-1])
    tensors = layer_tensors(channels, units, rank, 3, (size, size), batch=batch, dtype=torch.bfloat16)
    step = step_of(tensors, torch.randn(batch, units, size, size).to(DEVICE, torch.bfloat16), padding=1)
    first = step()
    assert max(parts) > 1
    assert same_bits(step(), first)
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(step())
    torch.cuda.synchronize()
    assert all(same_bits(results, first) for results in found)


# -- CUDA graphs
# ------------------------------------------------------------------------------------------------------------


def captured(step):
    """A function that replays ``step`` from a CUDA graph and returns its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay():
        graph.replay()
        return [t.clone() for t in results]

    return replay


def refill(tensors):
    """Write new values in place, so that parameters packed from the old values are stale."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor) * tensor.std())


@pytest.mark.parametrize("rank", [64, 128])
@pytest.mark.parametrize("part", ["forward", "forward and backward"])
def test_graph_of_a_layer(part, rank):
    """A graph that is replayed with new inputs and new parameters gives the bits of eager mode."""
    tensors = layer_tensors(64, 32, rank, 3, (9, 9), batch=3, dtype=torch.bfloat16)
    grad = torch.randn(3, 32, 9, 9).to(DEVICE, torch.bfloat16)

    def forward():
        with torch.no_grad():
            return [fused(*tensors, padding=1)]

    step = forward if part == "forward" else step_of(tensors, grad, padding=1)
    replay = captured(step)
    seen = [replay()]
    for changed in ([tensors[0], grad], tensors[1:2], tensors[2:3], tensors[3:]):
        refill(changed)
        seen.append(replay())
        assert same_bits(seen[-1], step())
        assert not torch.equal(seen[-1][0], seen[-2][0])


def small_network():
    """A network with both forms, a stride, and a 1 x 1 head."""
    net = CoDANet(
        [16, 32, 10],
        ranks=[16, 32, 32],
        kernel_sizes=[3, 3, 1],
        strides=[1, 2, 1],
        temperature=10,
        backend="triton",
    )
    return net.to(DEVICE)


def network_step(net, images, grad):
    """[logits, gradients of images and parameters]."""
    logits = net(images)
    return [logits, *torch.autograd.grad(logits, [images, *net.parameters()], grad)]


def small_inputs():
    return torch.rand(4, 3, 16, 16).to(DEVICE).requires_grad_(), torch.randn(4, 10).to(DEVICE)


def test_graph_of_a_network():
    net, (images, grad) = small_network(), small_inputs()
    step = lambda: network_step(net, images, grad)
    replay = captured(step)
    for changed in ([images, grad], list(net.parameters())):
        refill(changed)
        assert same_bits(replay(), step())


def test_graphed_callable():
    """torch.cuda.make_graphed_callables: the optimiser changes the parameters between replays."""
    net, (images, grad) = small_network(), small_inputs()
    twin = copy.deepcopy(net)
    graphed = torch.cuda.make_graphed_callables(net, (images.detach().clone().requires_grad_(),))
    for _ in range(3):
        refill([images, grad])
        found = [t.clone() for t in network_step(graphed, images, grad)]
        expected = network_step(twin, images, grad)
        assert same_bits(found, expected)
        with torch.no_grad():
            for parameters, gradients in ((net.parameters(), found[2:]), (twin.parameters(), expected[2:])):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient


# -- every configuration
# ------------------------------------------------------------------------------------------------------------

# One layer of each kind: stem, contracted with a stride, contracted, head; generated with ranks in one piece,
# and in several pieces
SPECS = config.kernel_specs()
GRID_LAYERS = [S_LAYERS[0], S_LAYERS[2], S_LAYERS[5], S_LAYERS[6], L_LAYERS[2], L_LAYERS[4]]
FLOAT32_LAYERS = [S_LAYERS[0], S_LAYERS[2], S_LAYERS[5], L_LAYERS[4]]


def shape_of(case, dtype):
    channels, units, rank, kernel, stride = case
    return config.Shape(
        channels, units, rank, (kernel, kernel), (stride, stride), bits=torch.finfo(dtype).bits
    )


def kernels_of(shape):
    """The kernels that the layer launches."""
    left_out = ("contracted", "contracted_kept") if shape.generated else ("generated",)
    return [kernel for kernel in SPECS if kernel not in left_out]


def cases():
    """(layer, dtype, kernel, tile): all tiles that the package may use on this device (on a machine without a
    GPU: on an H100).
    """
    device = layer.device_of(DEVICE)
    dtyped = [(case, torch.bfloat16) for case in dict.fromkeys(S_LAYERS + L_LAYERS)] + [
        (case, torch.float32) for case in FLOAT32_LAYERS
    ]
    for case, dtype in dtyped:
        shape = shape_of(case, dtype)
        for kernel in kernels_of(shape):
            for tile in config.candidates(SPECS[kernel], shape, device):
                yield pytest.param(
                    case, dtype, kernel, tile, id=f"{SPECS[kernel].row_key(shape)} {tile_id(tile)}"
                )


def grid_cases():
    """(layer, kernel): the kernels whose code depends on warps and stages."""
    for case in GRID_LAYERS:
        shape = shape_of(case, torch.bfloat16)
        for kernel in kernels_of(shape):
            yield pytest.param(case, kernel, id=SPECS[kernel].row_key(shape))


def tile_id(tile):
    return " ".join(f"{name}{size}" for name, size in tile.blocks) + f" w{tile.warps} s{tile.stages}"


@contextlib.contextmanager
def forced(monkeypatch, kernel, tile):
    """Use only this tile for this kernel, which must be launched. A tile that the device cannot hold skips
    the test.
    """
    candidates, used = config.candidates, []

    def only(spec, shape, device):
        return (used.append(tile) or tile,) if spec.name == kernel else candidates(spec, shape, device)

    with monkeypatch.context() as patch:
        patch.setattr(config, "candidates", only)
        patch.setattr(layer, "_first_fitting", {})  # positions in the full lists
        try:
            yield
        except triton.runtime.errors.OutOfResources as error:
            pytest.skip(f"{kernel} {tile_id(tile)}: {error}")
    assert used, f"{kernel} was not launched"


def compare_layer(case, dtype, kernel=None, size=(12, 12)):
    """Compare forward, gradients and explanation of two images with the definition in float64, in the form
    that launches ``kernel``.
    """
    channels, units, rank, side, stride = case
    tensors = layer_tensors(channels, units, rank, side, size, batch=2, dtype=dtype)
    options = dict(stride=stride, padding=(side - 1) // 2)
    compare(tensors, **options, save_contraction=kernel == "contracted_kept")
    compare([tensors[0], *(t.detach() for t in tensors[1:])], **options, detach=True)


@pytest.mark.parametrize(("case", "dtype", "kernel", "tile"), list(cases()))
def test_shipped_tile(case, dtype, kernel, tile, monkeypatch):
    with forced(monkeypatch, kernel, tile):
        compare_layer(case, dtype, kernel)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize(("case", "kernel"), list(grid_cases()))
def test_warps_and_stages(case, kernel, warps, stages, monkeypatch):
    """The wanted blocks with every number of warps and stages."""
    wanted = config.candidates(SPECS[kernel], shape_of(case, torch.bfloat16), layer.device_of(DEVICE))[0]
    with forced(monkeypatch, kernel, config.Tile(wanted.blocks, warps, stages)):
        compare_layer(case, torch.bfloat16, kernel)


# -- precision of float32
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_matmul_precision")
@pytest.mark.skipif(
    torch.version.hip is not None, reason="AMD computes float32 as it is under either setting"
)
@pytest.mark.parametrize("case", [S_LAYERS[0], S7, L_LAYERS[3]], ids=str)
def test_float32_follows_the_setting(case):
    """torch.set_float32_matmul_precision is followed: "highest" is as accurate as float32, and "high" as
    TF32.
    """
    channels, units, rank, kernel, _ = case
    tensors = layer_tensors(channels, units, rank, kernel, (12, 12), batch=2)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(2, units, 12, 12).to(DEVICE)
    truth = grads_of(lambda *t: dau_conv2d(*t, padding=1, backend="reference"), exact, grad.double())
    results = {}
    for setting, bound in (("highest", 5e-6), ("high", 5e-3)):
        torch.set_float32_matmul_precision(setting)
        results[setting] = grads_of(lambda *t: fused(*t, padding=1), tensors, grad)
        assert errors(results[setting][0], truth[0])[0] < bound
        for found, expected in zip(results[setting], truth, strict=True):
            assert errors(found, expected)[1] < bound
    for i, (fine, coarse) in enumerate(zip(results["highest"], results["high"], strict=True)):
        assert errors(fine, truth[i])[1] < errors(coarse, truth[i])[1] / 10


# -- the compiler
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_network(mode):
    """torch.compile into one graph gives the results of eager mode within rounding, over several steps with
    new values and parameters.
    """
    torch._dynamo.reset()
    net, (images, grad) = small_network(), small_inputs()
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    try:
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = [t.clone() for t in network_step(compiled, images, grad)]
            for a, b in zip(found, network_step(net, images, grad), strict=True):
                assert max(errors(a, b)) < 1e-5
            refill([images, grad, *net.parameters()])
    finally:
        torch._dynamo.reset()


# -- memory
# ------------------------------------------------------------------------------------------------------------


def peak_bytes(batch):
    """Memory that forward + backward of S-CoDA's layer 7 takes in addition to inputs and parameters."""
    channels, units, rank, kernel, _ = S7
    tensors = layer_tensors(channels, units, rank, kernel, (8, 8), batch=batch, dtype=torch.bfloat16)
    grad = torch.randn(batch, units, 8, 8).to(DEVICE, torch.bfloat16)
    for _ in range(2):  # in the first call libraries allocate their workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads_of(lambda *t: fused(*t, padding=1), tensors, grad)
        peak = torch.cuda.max_memory_allocated() - before
    return peak


def test_peak_memory():
    """The memory is less than a twentieth of [P, n, d], the weights of every patch: a batch of 1024 needs
    less in all, and each image of any batch does. (A small batch also pays for partial sums of the size of
    the parameters, 47 MB here, which do not grow with it.)
    """
    channels, units, _, kernel, _ = S7
    weights = 2 * 8 * 8 * units * channels * kernel**2  # bytes per image
    small, large = peak_bytes(64), peak_bytes(1024)
    assert large < 1024 * weights / 20
    assert large - small < (1024 - 64) * weights / 20
    assert small < 64 * weights / 4


# -- another device
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("rank", [16, 128])
def test_second_device(rank):
    """Tensors on another device than the current one are computed there, with the results of the first
    device.
    """
    tensors = layer_tensors(9, 4, rank, 3, (9, 9), batch=2)
    grad = torch.randn(2, 4, 9, 9).to(DEVICE)
    expected = step_of(tensors, grad, padding=1)()
    there = [t.detach().to("cuda:1").requires_grad_() for t in tensors]
    with torch.cuda.device(0):
        found = step_of(there, grad.to("cuda:1"), padding=1)()
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in found)
    alike = torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1)
    assert all(
        torch.equal(a.cpu(), b.cpu()) if alike else max(errors(a, b)) < 1e-5
        for a, b in zip(found, expected, strict=True)
    )


# -- compute-sanitizer
# ------------------------------------------------------------------------------------------------------------

SANITISED = """
import torch
from coda_fast.functional import dau_conv2d

device = "cuda" if torch.cuda.is_available() else "cpu"
for dtype in (torch.bfloat16, torch.float32):
    for channels, units, rank, kernel, size, options in (
        (9, 5, 7, (3, 3), (7, 5), dict(padding=1)),
        (9, 5, 7, (3, 2), (9, 11), dict(padding=(0, 2), stride=(2, 3), dilation=(2, 1))),
        (6, 17, 40, (1, 1), (5, 5), dict()),
        (16, 3, 130, (3, 3), (6, 6), dict(padding=1, stride=2)),
    ):
        x = torch.randn(2, channels, *size, device=device, dtype=dtype)
        shapes = (rank,), (units, rank), (units,)
        tensors = [
        torch.randn(*shape, channels, *kernel, device=device, dtype=dtype) for shape in shapes
    ]
    tensors = [x, *tensors]
        tensors = [t.requires_grad_() for t in tensors]
        for keep in (False, True):
            dau_conv2d(*tensors, **options, backend="triton", save_contraction=keep).sum().backward()
        y = dau_conv2d(*tensors, **options, backend="triton", detach=True)
        torch.autograd.grad(y, x, torch.ones_like(y))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """No access outside an allocation (each tensor is one here), and no race in shared memory."""
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "1"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", SANITISED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
