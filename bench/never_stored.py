"""Cases of masks that are never stored, beside those of cases.py: where the two forms of a mask
cost the same, and the network of the scores inside the kernel.

The goals are those of a CPU with 2 threads. LearnableAttentionMask.form decides by the first.
"""

from __future__ import annotations

# QD-DETR, text to video
W5 = {"B": 32, "H": 8, "Lq": 75, "Lk": 32, "D": 32, "key_mask": True}


def _shape(B: int, H: int, L: int, rank: int) -> dict:
    return {"B": B, "H": H, "Lq": L, "D": 64, "multiplier": f"rank {rank}: b1 11 11"}


def cases(Case, Goal) -> list:
    sets, single = ("low-rank",), ("fp32",)
    found = []
    for B, H, L in ((8, 12, 197), (4, 8, 512), (1, 8, 1024)):
        for rank in (16, 128, 256):
            shape, peers = _shape(B, H, L, rank), ("ours_product",)
            name = f"rank{rank}-B{B}-L{L}"
            found.append(Case(name, "low rank", shape, peers, dtypes=single, sets=sets))
    for depth in (32, 4):
        goals = (Goal(0.5, ("compile",), directions=("both",)),) if depth == 32 else ()
        found.append(
            Case(f"score-W5-depth{depth}", "score", W5 | {"depth": depth, "hidden": 32},
                 ("compile", "eager"), goals, single, ("both", "fwd"), sets=sets,
                 op="score_masked_attention")
        )  # fmt: skip
    return found
