"""A spy on the op, and two models compared as report.check compares them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Spy(TorchDispatchMode):
    """Counts calls of the op: with a dispatch mode around, every call goes through the
    dispatcher."""

    def __init__(self):
        super().__init__()
        self.forwards = self.backwards = 0
        self.backends = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.lam_kernels.masked_attention_fwd.default:
            self.forwards += 1
            self.backends.add(args[-1])
        elif function is torch.ops.lam_kernels.masked_attention_bwd.default:
            self.backwards += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def spy():
    return Spy


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
