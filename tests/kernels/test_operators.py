"""The operators on the kernels: torch's own checks, compilation and export as with any backend. Device guards
are in test_gpu.py.
"""

import io

import pytest
import torch
from support_kernels import DEVICE, errors, layer_tensors

import coda_fast

align, align_backward, adjoint = (
    getattr(torch.ops.coda_fast, name).default for name in ("align", "align_backward", "adjoint")
)
WINDOW = ([2, 1], [1, 0, 1, 2], [1, 2])  # stride, padding (left, right, top, bottom), dilation
PLAIN = ("squash", 1e-6)


def case(layout, dtype, rank=5, bias=True):
    tensors = [
        None if t is None else t.detach()
        for t in layer_tensors(9, 4, rank, (3, 2), (6, 7), batch=2, bias=bias, dtype=dtype)
    ]
    if layout == "channels_last":
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    if layout == "sliced":
        tensors[0] = torch.randn(4, 18, 6, 7).to(DEVICE, dtype)[::2, ::2]
    return [None if t is None else t.requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    ("layout", "dtype", "rank", "applied", "detach", "keep"),
    [
        ("contiguous", torch.float32, 5, False, False, "products"),
        ("channels_last", torch.bfloat16, 5, False, False, "contraction"),
        ("sliced", torch.float16, 130, True, False, "products"),
        ("channels_last", torch.float32, 130, False, True, "norm"),
        ("contiguous", torch.bfloat16, 5, False, False, "nothing"),
    ],
    ids=str,
)
def test_opcheck(layout, dtype, rank, applied, detach, keep):
    x, *parameters = case(layout, dtype, rank)
    u = torch.randn(2, 9, 6, 7).to(DEVICE, dtype) if applied else None
    torch.library.opcheck(align, (x, u, *parameters, *WINDOW, *PLAIN, detach, keep, "triton"))
    if keep != "nothing":
        # second derivatives are tested in tests/test_ops.py
        tensors = [None if t is None else t.detach() for t in (x, u, *parameters)]
        output, *kept = align(*tensors, *WINDOW, *PLAIN, detach, keep, "triton")
        needs = [True, applied, *[not detach] * 3]
        torch.library.opcheck(
            align_backward,
            (torch.randn_like(output), *tensors, *kept, *WINDOW, *PLAIN, detach, needs, "triton"),
        )


@pytest.mark.parametrize(
    ("layout", "dtype", "bias"),
    [("channels_last", torch.float32, True), ("sliced", torch.bfloat16, False)],
    ids=str,
)
def test_opcheck_adjoint(layout, dtype, bias):
    x, *parameters = case(layout, dtype, bias=bias)
    value = torch.randn(2, 4, 4, 6).to(DEVICE, dtype).requires_grad_()
    torch.library.opcheck(adjoint, (x, value, *parameters, *WINDOW, *PLAIN, "triton"))


def small_net():
    options = dict(ranks=[4, 5], kernel_sizes=[3, 1], strides=[2, 1], temperature=10, image_channels=1)
    return coda_fast.CoDANet([6, 3], **options, backend="triton").to(DEVICE)


@pytest.mark.slow
def test_compile_and_train():
    """Forward and backward compile to one graph, with at most a static and a dynamic compilation for all
    batch sizes.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    net, counter = small_net(), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    fast = torch.compile(net, fullgraph=True, backend=counter)
    for batch in range(2, 6):
        images = torch.rand(batch, 1, 6, 6).to(DEVICE)
        losses = [m(images).square().mean() for m in (fast, net)]
        ours, eager = (torch.autograd.grad(loss, list(net.parameters())) for loss in losses)
        assert torch.equal(*losses)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow
def test_export_and_load():
    net, images = small_net(), torch.rand(2, 1, 6, 6).to(DEVICE)
    with torch.no_grad():
        program = torch.export.export(
            net, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        more = torch.rand(3, 1, 6, 6).to(DEVICE)
        assert torch.equal(loaded(more), net(more))


def test_autocast():
    """Under autocast all inputs are cast to its dtype first, as for a convolution. Tensors kept for backward
    stay float32.
    """
    tensors = layer_tensors(9, 4, 5, 3, (5, 4))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = coda_fast.functional.dau_conv2d(*tensors, padding=1, backend="triton")
        kept = align(
            *[tensors[0], None, *tensors[1:]], [1, 1], [1] * 4, [1, 1], *PLAIN, False, "products", "triton"
        )
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, coda_fast.functional.dau_conv2d(*(t.bfloat16() for t in tensors), padding=1, backend="triton")
    )
    assert [t.dtype for t in kept[:3]] == [torch.bfloat16, torch.float32, torch.float32]
    grads = torch.autograd.grad(y.float().square().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)
    assert (
        errors(
            y, coda_fast.functional.dau_conv2d(*(t.double() for t in tensors), padding=1, backend="reference")
        )[0]
        < 2e-2
    )


def test_refuses_other_dtypes():
    tensors = [t.detach().double() for t in layer_tensors(9, 4, 5, 3, (5, 4))]
    with pytest.raises(
        TypeError, match=r'backend="triton": expected float32, bfloat16 or float16, got torch.float64'
    ):
        align(tensors[0], None, *tensors[1:], *WINDOW, *PLAIN, False, "nothing", "triton")
    # for float64 the function uses the factored backend
    y = coda_fast.functional.dau_conv2d(*tensors, backend="triton")
    assert y.dtype == torch.float64
