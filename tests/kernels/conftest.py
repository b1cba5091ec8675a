"""The interpreter multiplies small matrices with NumPy, whose threads cost more there than they give: four times the time on 2 cores."""

import pytest
import threadpoolctl


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
