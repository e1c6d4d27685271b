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
            *cases("float32", "both masks", "hidden by the bias", "one pattern a head", "dilated"),
            *cases(
                "bfloat16",
                "plain", "one row", "one key", "everything", "blocks from the end", "segments",
                "padding", "both masks", "other mask dtypes", "one pattern a head", "wide scores",
                "negative scale",
            ),
            *cases("float16", "multiplier", "causal"),
        ],
        "test_tiles": [{"case": case} for case in ("square", "masks", "keys")],
        "test_head_dims": [{"D": D} for D in ("3", "80", "200")],
        "test_strides": [{"of": of, "layout": "sliced"} for of in ("layout", "grad_layout")],
        "test_only_wanted_gradients": [
            {"grads": grads, "dtype": "bfloat16"} for grads in ("", "q", "k", "v", "b", "mb")
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
