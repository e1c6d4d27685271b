"""Which tests of the ops beside masked_attention the emulated CUDA kernels run in an ordinary
`make test`, chosen to touch every feature; `make test-full` runs all, and so does a run on a GPU.
"""

from __future__ import annotations

import torch
from interpreted import cases, listed

# test file -> test function -> values of its parameters; one that is not named is any
SUBSETS: dict[str, dict[str, list[dict[str, str]]]] = {
    "test_global_local_attention": {
        "test_case": [
            *cases("float32", "both masks", "one row"),
            *cases(
                "bfloat16",
                "one key", "blocks from the end", "segments", "padding", "hidden by the bias",
                "other mask dtypes", "wide scores", "negative scale",
            ),
            *cases("float16", "causal"),
        ],
        "test_tiles": [{"case": "keys"}],
        "test_head_dims": [{"D": D} for D in ("3", "200")],
        "test_strides": [{"of": "layout", "layout": "sliced"}],
        "test_only_wanted_gradients": [
            {"grads": grads, "dtype": "bfloat16"} for grads in ("", "q", "v", "mb")
        ],
    },
}  # fmt: skip


def left_out(item) -> str:
    """Why an ordinary run leaves this test out, "" when it takes it."""
    if torch.cuda.is_available() or item.path.parent.name != "ops":
        return ""
    subset = SUBSETS.get(item.path.stem)
    if subset is None or listed(item, subset):
        return ""
    return "emulated: a subset here (tests/emulated.py), all with --full"
