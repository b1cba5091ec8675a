"""The faster interpreter, which most tests of the kernels run under, computes what Triton's own computes."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = """
import sys, torch
sys.path.insert(0, "tests")
if sys.argv[1] == "quick":
    import quick_interpreter
    quick_interpreter.install()
from coda_fast.functional import dau_conv2d

found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    tensors = [torch.randn(*s, dtype=dtype, requires_grad=True)
               for s in ((2, 3, 5, 4), (18, 3, 3, 3), (4, 18, 3, 3, 3), (4, 3, 3, 3))]
    y = dau_conv2d(*tensors, stride=(1, 2), padding=1, backend="triton")
    found += [y.detach(), *torch.autograd.grad(y.float().square().sum(), tensors)]
torch.save(found, sys.argv[2])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on a GPU")
def test_same_bits(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    for which in ("plain", "quick"):
        command = [sys.executable, "-c", RESULTS, which, str(tmp_path / which)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    plain, quick = (torch.load(tmp_path / which) for which in ("plain", "quick"))
    assert len(plain) == 15
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(plain, quick, strict=True))
