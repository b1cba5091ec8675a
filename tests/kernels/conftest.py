"""The interpreter multiplies small matrices with NumPy, whose threads cost more there than they give: four
times the time on 2 cores.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # no interpreter; the tests must run there with pytest alone (tools/gpu_report.py)
    if torch.cuda.is_available():
        yield
        return
    try:
        import threadpoolctl
    except ImportError:  # slower, and right all the same
        yield
        return
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
