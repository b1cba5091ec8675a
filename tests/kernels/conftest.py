"""Under the interpreter NumPy multiplies small matrices, and its threads make that four times slower on 2
cores.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # a GPU needs no interpreter, and its tests must run with pytest alone (tools/gpu_report.py)
    if torch.cuda.is_available():
        yield
        return
    try:
        import threadpoolctl
    except ImportError:  # slower but still correct
        yield
        return
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
