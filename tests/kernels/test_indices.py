"""The index arithmetic of the kernels beyond 2^31, in a kernel of one program, against Python's integers."""

import pytest
import torch
import triton
import triton.language as tl
from support_kernels import DEVICE

from coda_kernels._tiles import narrow, pixel_tile, widen, window_offsets, window_starts


@triton.jit
def _starts(
    out_ptr,
    known_ptr,
    i_p,
    P: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    CP: tl.constexpr,
    S: tl.constexpr,
    BP: tl.constexpr,
):
    first, o_p, o_known = pixel_tile(i_p, P, BP)
    tl.store(out_ptr + tl.arange(0, BP), window_starts(first, o_known, OH, OW, HP, WP, CP, S, S))
    tl.store(known_ptr + tl.arange(0, BP), o_p)


@pytest.mark.parametrize("size", [(32, 32), (7, 5), (1, 1), (6000, 5000)], ids=str)
@pytest.mark.parametrize(
    "tile", ["first", "across an image", "beyond 2^31 entries", "beyond 2^31 pixels", "last"]
)
def test_window_starts(size, tile):
    stride, channels, block = 2, 8, 64
    rows, columns = size
    height, width = stride * rows + 3, stride * columns + 5  # size of the padded image
    per_image = rows * columns
    images = max(3, 2**31 // per_image + 2)
    pixels = images * per_image - 3
    pixel = {
        "first": 0,
        "across an image": per_image - 1,
        "beyond 2^31 entries": (2**31 // (height * width * channels) + 1) * per_image,
        "beyond 2^31 pixels": 2**31 + 1,
        "last": pixels - 1,
    }[tile]
    index = min(pixel, pixels - 1) // block
    out, all_pixels = (torch.empty(block, dtype=torch.int64, device=DEVICE) for _ in range(2))
    _starts[(1,)](
        out, all_pixels, index, pixels, rows, columns, height, width, CP=channels, S=stride, BP=block
    )
    expected = []
    for p in range(index * block, (index + 1) * block):
        image, rest = divmod(min(p, pixels - 1), per_image)
        expected.append(
            ((image * height + rest // columns * stride) * width + rest % columns * stride) * channels
        )
    assert out.tolist() == expected
    assert all_pixels.tolist() == list(range(index * block, (index + 1) * block))


@triton.jit
def _offsets(
    out_ptr,
    WP,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    N: tl.constexpr,
):
    o_k = tl.arange(0, N)
    tl.store(out_ptr + o_k, window_offsets(o_k, WP, CP, KH, KW, DH, DW))


@pytest.mark.parametrize(
    ("kernel", "dilation", "channels"), [((3, 2), (1, 1), 8), ((2, 3), (2, 3), 24), ((1, 1), (1, 1), 16)]
)
def test_window_offsets(kernel, dilation, channels):
    width, count = 37, 256
    out = torch.empty(count, dtype=torch.int32, device=DEVICE)
    _offsets[(1,)](
        out, width, CP=channels, KH=kernel[0], KW=kernel[1], DH=dilation[0], DW=dilation[1], N=count
    )
    for k, found in enumerate(out.tolist()):
        tap, c = divmod(k, channels)
        inside = tap < kernel[0] * kernel[1]
        # past the window the first tap is read, where no load can fail
        i, j = divmod(tap, kernel[1]) if inside else (0, 0)
        assert found == (i * dilation[0] * width + j * dilation[1]) * channels + c


@triton.jit
def _round(x_ptr, y_ptr, back_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    y = narrow(tl.load(x_ptr + o), y_ptr.dtype.element_ty)
    tl.store(y_ptr + o, y)
    tl.store(back_ptr + o, widen(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_is_torchs(dtype):
    """Rounding to the nearest even number and back is exact, for subnormal numbers and infinities too: the
    interpreter's own implementation agrees with a GPU.
    """
    special = torch.tensor(
        [
            0.0,
            -0.0,
            1e-45,
            1e-40,
            6e-8,
            1.0,
            1 + 2**-8,
            1 + 3 * 2**-8,
            65504,
            float("inf"),
            float("-inf"),
            float("nan"),
        ]
    )
    x = torch.cat(
        (special, torch.randn(2048 - len(special)) * 2.0 ** torch.randint(-20, 14, (2048 - len(special),)))
    )
    x = x.clamp(-65504, 65504) if dtype == torch.float16 else x
    x = x.to(DEVICE)
    y, back = torch.empty(2048, dtype=dtype, device=DEVICE), torch.empty(2048, device=DEVICE)
    _round[(1,)](x, y, back, N=2048)
    expected = x.to(dtype)
    normal = (
        (expected == 0) | (expected.float().abs() >= torch.finfo(dtype).smallest_normal) | expected.isnan()
    )
    if dtype == torch.float16:  # NumPy keeps subnormal float16 numbers, as a GPU does
        normal = torch.ones_like(normal)
    assert torch.equal(y[normal].nan_to_num(7), expected[normal].nan_to_num(7))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(back.nan_to_num(7), y.float().nan_to_num(7))
