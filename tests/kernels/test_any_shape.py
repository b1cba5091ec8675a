"""The fused kernels against the definition in float64, at shapes that hypothesis chooses (test_layer.py does
not need hypothesis).
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support_kernels import compare, layer_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    torch.manual_seed(draw(0, 2**32 - 1))  # drawn with the example, so that its numbers are always the same
    kernel, stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 2)), (draw(1, 2), draw(1, 2))
    padding = (draw(0, 2), draw(0, 2))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 4)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    channels, units, rank = draw(1, 20), draw(1, 20), draw(1, 40)
    norm = data.draw(st.sampled_from(["squash", "l2"]))
    # one number divided by its length is a sign, in which eager makes no error
    assume(norm == "squash" or channels * kernel[0] * kernel[1] > 1)
    tensors = layer_tensors(
        channels,
        units,
        rank,
        kernel,
        size,
        batch=draw(1, 3),
        bias=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
    )
    # Under "l2" the kernels' gradients have a factor 1 / |w|^2, which must fit into float16; eager torch's
    # have 1 / |w|
    eps = 3e-2 if tensors[0].dtype == torch.float16 else 1e-6
    compare(tensors, stride=stride, padding=padding, dilation=dilation, norm=norm, eps=eps)


def test_an_example_is_the_same_whenever_it_runs(monkeypatch):
    """The numbers of an example do not depend on other tests or examples that ran before it."""
    seen = []
    monkeypatch.setitem(
        globals(), "compare", lambda tensors, **options: seen.append([*tensors, torch.get_rng_state()])
    )
    for left_by_others in (1, 2):
        torch.manual_seed(left_by_others)
        test_any_shape()
    half = len(seen) // 2
    assert half >= 20
    for first, second in zip(seen[:half], seen[half:], strict=True):
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, second, strict=True))
