"""Module tests run in float64, where the default tolerances of torch.testing mean something."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
