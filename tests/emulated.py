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
    "test_map_gated_attention": {
        "test_case": [
            *cases("float32", "renormalised padding", "one position"),
            *cases(
                "bfloat16",
                "segments", "padding", "renormalised", "other gate dtypes", "wide scores",
            ),
            *cases("float16", "causal"),
        ],
        "test_head_dims": [{"D": D} for D in ("3", "200")],
        "test_strides": [{"of": "mask_layout", "layout": "transposed"}],
        "test_only_wanted_gradients": [
            {"grads": grads, "dtype": "bfloat16"} for grads in ("", "q", "v", "m", "b")
        ],
    },
    "test_masked_attention_low_rank": {
        "test_case": [
            *cases("float32", "both", "rows without keys"),
            *cases(
                "bfloat16",
                "multiplier", "bias", "no offset", "dense bias", "dense multiplier", "key weights",
                "shared by all", "more keys", "shared heads", "keys hidden by the offset",
                "dropout", "one pattern a head",
            ),
            *cases("float16", "more rows"),
        ],
        "test_ranks": [{"rank": rank} for rank in ("17", "100")],
        "test_strides": [
            {"layout": "sliced", "dtype": "bfloat16"}, {"layout": "expanded", "dtype": "float32"},
        ],
        "test_factors_have_their_own_dtype": [
            {"factors": "float32", "dtype": "bfloat16"}, {"factors": "float16", "dtype": "float32"},
        ],
        "test_one_factor_alone": [{}],
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
