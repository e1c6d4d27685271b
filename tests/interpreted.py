"""Which operator tests the Triton kernels run in an ordinary `make test` without a GPU.

The interpreter takes milliseconds for an operation on a tile, so only these run in it, chosen to
touch every feature; `make test-full` runs all, and so does any run on a GPU.
"""

from __future__ import annotations

import torch


def cases(dtype: str, *names: str) -> list[dict[str, str]]:
    return [{"case": name, "dtype": dtype} for name in names]


# test function -> values of its parameters beside the backend; one that is not named is any
SUBSET: dict[str, list[dict[str, str]]] = {
    "test_case": [
        *cases(
            "float32",
            "no mask, one row", "no mask, one key", "both masks, all full", "mask of one number",
            "gate", "gate, key weights", "masks of two other dtypes", "more rows than keys",
            "rows without keys", "hidden by the bias", "dropout, nearly all", "lse alone",
            "wide scores", "scale of zero",
        ),
        *cases(
            "bfloat16",
            "no mask", "both masks", "learned scale", "gate in half precision", "float32 masks",
            "more keys than rows", "shared heads", "one shared head", "windows",
            "rows without keys", "hidden by the bias", "dropout", "dropout, local",
            "negative scale", "tiles", "tiles, shared mask", "tiles, keys", "tiles, rows",
            "tiles, local", "tiles, dilated", "tiles, blocks", "tiles, causal",
            "one pattern a head",
        ),
        *cases("float16", "both masks", "mask of rows", "gate", "dropout"),
    ],
    "test_broadcast": [
        {"use": "multiplier", "axes": axes} for axes in ("bhqk", "1h1k", "b1q1", "11qk", "qk")
    ]
    + [{"use": "bias", "axes": axes} for axes in ("1hqk", "11q1", "bh1k", "1111")]
    + [{"use": "gate", "axes": axes} for axes in ("b1qk", "bh11")],
    "test_pattern": [
        {"pattern": pattern} for pattern in (
            "DilatedToeplitz(24, 3)", "Causal() & Toeplitz(20)",
        )
    ],
    "test_head_dims": [{"D": D} for D in ("1", "24", "96", "256")],
    "test_strides": [
        {"of": of, "layout": layout, "dtype": "float32"}
        for of in ("layout", "mask_layout", "grad_layout")
        for layout in ("sliced", "expanded", "last_strided")
    ],
    "test_strides_of_key_mask_and_results": [{}],
    "test_only_wanted_gradients": [{"dtype": "bfloat16"}],
    "test_large_scores_lose_no_weight": [{}],
    # the conventions, one test a row
    "test_order": [{}],
    "test_boolean_masks_true_is_seen": [{}],
    "test_row_that_sees_no_key": [{"dtype": "float32", "dropout_p": "0.0"}],
    "test_bias_of_minus_infinity": [{"dtype": "bfloat16"}],
    "test_nan_and_plus_infinity_at_a_visible_pair_propagate": [{}],
    "test_hidden_pair_is_never_used": [{"hide": "pattern", "dtype": "float32"}],
    "test_values_of_hidden_keys_do_not_reach_anyone": [{"dtype": "float32"}],
    "test_multiplier_of_zero_does_not_hide": [{}],
    "test_gate": [{"dtype": "float32"}],
    "test_lse": [{"dtype": "float32"}],
    "test_lse_below_the_range_of_exp": [{}],
    "test_dtypes": [{"operand": "bfloat16", "dtype": "float16"}],
    "test_dtypes_must_agree": [{}],
    "test_autocast": [{}],
    "test_batch_mates": [{"dtype": "bfloat16"}],
    "test_offsets_are_64_bit": [{}],
    "test_layout": [{}],
    "test_sizes_of_zero": [{"dtype": "float32"}],
    "test_sizes_of_head_dims": [{}],
    "test_dropout": [{}],
    "test_positions": [{}],
    "test_double_backward": [{}],
    "test_bad_input": [{"argument": "query"}],
}  # fmt: skip
LOW_RANK: dict[str, list[dict[str, str]]] = {
    "test_case": [
        *cases("float32", "keys hidden by the offset"),
        *cases("bfloat16", "more keys"),
        *cases("float16", "multiplier"),
    ],
    "test_only_wanted_gradients": [{"grads": "b"}, {"grads": "q"}],
    "test_factors_of_three_dtypes": [{}],
    "test_identity": [{"dtype": "float32"}],
}
SCORE: dict[str, list[dict[str, str]]] = {
    "test_case": [
        *cases("float32", "mean", "wide", "sample without keys", "negative scale"),
        *cases("bfloat16", "two layers", "mean, add", "one layer", "unequal head dims"),
        *cases("float16", "add"),
    ],
    "test_only_wanted_gradients": [{"grads": grads, "dtype": "float32"} for grads in ("v", "qm")],
    "test_a_constant_network_is_plain_attention": [{"fusion": "mul"}],
    "test_hidden_keys_do_not_reach_the_network": [{}],
    "test_nothing_to_attend": [{}],
}
# small problems with every feature of these two ops are tests/triton_kernels/test_two_maps.py
BOTH: dict[str, list[dict[str, str]]] = {"test_case": cases("bfloat16", "both masks")}
GATED: dict[str, list[dict[str, str]]] = {"test_case": cases("bfloat16", "other gate dtypes")}
# file -> its part
SUBSETS = {
    "test_masked_attention": SUBSET,
    "test_masked_attention_conventions": SUBSET,
    "test_masked_attention_low_rank": LOW_RANK,
    "test_score_masked_attention": SCORE,
    "test_global_local_attention": BOTH,
    "test_map_gated_attention": GATED,
}


def listed(item, subset: dict[str, list[dict[str, str]]]) -> bool:
    """Whether a test has the parameters of one of the lines under its name."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return any(
        all(str(given.get(name)) == value for name, value in wanted.items())
        for wanted in subset.get(item.originalname, ())
    )


def left_out(item) -> str:
    """Why an ordinary run leaves this test out, "" when it takes it."""
    if (
        torch.cuda.is_available() or item.path.parent.name == "triton_kernels"
    ):  # the backend's own tests
        return ""
    if listed(item, SUBSETS.get(item.path.stem, {})):
        return ""
    return "in the interpreter: a subset here (tests/interpreted.py), all with --full"
