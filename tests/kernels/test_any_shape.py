"""The fused kernels against the definition in float64, at shapes that nobody chose (test_layer.py does without hypothesis)."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support_kernels import compare, layer_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 2)), (draw(1, 2), draw(1, 2))
    padding = (draw(0, 2), draw(0, 2))
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 4) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    channels, units, rank = draw(1, 20), draw(1, 20), draw(1, 40)
    norm = data.draw(st.sampled_from(["squash", "l2"]))
    assume(norm == "squash" or channels * kernel[0] * kernel[1] > 1)  # one number over its length: gradients vanish, errors do not
    tensors = layer_tensors(
        channels, units, rank, kernel, size, batch=draw(1, 3), bias=data.draw(st.booleans()), dtype=data.draw(st.sampled_from(DTYPES))
    )
    compare(tensors, stride=stride, padding=padding, dilation=dilation, norm=norm)
