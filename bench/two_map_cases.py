"""The goals of global and local attention: GateOp, GateAtt, ShareAtt and dilated neighbourhoods."""

from __future__ import annotations

from .cases import Case, Goal

_TORCH = ("eager_compile", "sdpa_compile")  # the best of them counts


def two_map_cases() -> list[Case]:
    stream = {"B": 4, "H": 8, "Lq": 300, "pattern": "Toeplitz(15)"}
    sets, fp32, bf16 = ("two-maps",), ("fp32",), ("bf16",)
    cases = []
    for name, D, at_most_fp32, at_most_bf16 in (("W12", 128, 0.65, 0.50), ("W13", 16, 0.45, 0.40)):
        goals = (
            Goal(at_most_fp32, _TORCH, fp32),
            Goal(at_most_bf16, _TORCH, bf16),
            Goal(1.35, ("ours_global",)),
        )
        cases.append(
            Case(f"gateop-{name}", "two maps", stream | {"D": D},
                 (*_TORCH, "ours_two_calls", "ours_global"), goals, sets=sets,
                 op="global_local_attention")
        )  # fmt: skip
    for name, D, at_most_fp32 in (("visual", 128, 0.55), ("audio", 16, 0.75)):
        goals = (
            Goal(at_most_fp32, ("eager_compile",), fp32),
            Goal(0.55, ("eager_compile",), bf16),
        )
        cases.append(
            Case(f"gateatt-W14-{name}", "two maps", stream | {"D": D}, ("eager_compile",), goals,
                 sets=sets, op="map_gated_attention")
        )  # fmt: skip
    half = stream | {"D": 128, "pattern": (None,) * 4 + ("Toeplitz(15)",) * 4}
    cases.append(
        Case("shareatt-W12", "two maps", half, ("ours_everywhere",),
             (Goal(0.75, ("ours_everywhere",)),), sets=sets)
    )  # fmt: skip
    dilated = {"B": 1, "H": 8, "Lq": 4096, "D": 64, "pattern": "DilatedToeplitz(64, 4)"}
    cases.append(
        Case("dilated64-step4", "two maps", dilated, ("strided64_compile",),
             (Goal(0.35, ("strided64_compile",)),), sets=sets)
    )  # fmt: skip
    return cases
