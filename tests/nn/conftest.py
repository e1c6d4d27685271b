"""Module tests run in float64, where the default tolerances of torch.testing mean most, or in the
widest dtype that their backend has."""

import pytest
import torch
from backends import widest


@pytest.fixture(autouse=True)
def widest_by_default(request):
    parameters = getattr(request.node, "callspec", None)
    backend = parameters.params.get("backend") if parameters else None
    torch.set_default_dtype(getattr(torch, widest(backend)) if backend else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
