"""Which operator tests the Triton kernels run in an ordinary `make test` without a GPU.

The interpreter takes milliseconds for an operation on a tile, so only these run in it, chosen to
touch every feature; `make test-full` runs all, and so does any run on a GPU.
"""

from __future__ import annotations

import torch

_HALF, _SINGLE = "bfloat16", "float32"

# test function -> values of its parameters beside the backend; a missing one is any
SUBSET: dict[str, list[dict[str, str]]] = {
    "test_case": [
        {"case": "no mask, one row", "dtype": _SINGLE},
    ],
}


def left_out(item) -> str:
    """Why an ordinary run leaves this test out, "" when it takes it."""
    if torch.cuda.is_available() or "interpreted" in item.keywords:
        return ""
    if item.path.parent.name == "triton":  # tests of the backend itself
        return ""
    given = item.callspec.params
    for wanted in SUBSET.get(item.originalname, ()):
        if all(str(given.get(name)) == value for name, value in wanted.items()):
            return ""
    return "in the interpreter: a subset here (tests/interpreted.py), all with --full"
