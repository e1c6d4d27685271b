"""Which problems the operator tests run: random ones by seed, and how one is evaluated."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from floors import one_thread
from tolerance import assert_accurate, with_gradients
from torch import Tensor

import lam_kernels
from python_ref.inputs import LAYOUTS, Operands, Problem

# Odd, prime, one below and above powers of two; the long ones cross every tile boundary of the
# kernels.
LENGTHS = (1, 2, 3, 7, 16, 17, 31, 33, 50, 63, 64, 65, 66, 100, 130, 197)
LONG = (257, 300, 515)
HEAD_DIMS = (1, 3, 8, 16, 24, 32, 40, 64, 80, 96, 128, 200, 256)
HALF = ("bfloat16", "float16")


def evaluate(
    problem: Problem, backend: str | None, operands: Operands | None = None
) -> dict[str, Tensor]:
    """out, lse and the wanted gradients from the public op."""
    o = operands or problem.operands()
    torch.manual_seed(problem.seed)  # dropout draws its seed from here, as tolerance.rng_state does
    masks = o.masks()
    fused = lam_kernels.masked_attention
    if problem.gate:
        fused = lam_kernels.lam_attention
        if masks.pop("multiplier") is not None:
            raise ValueError("the public op takes one learned mask beside a gate")
        masks |= {"mask": masks.pop("bias"), "fusion": "gate"}
    if backend == "reference":
        fused = one_thread(fused)
    out, lse = fused(o.query, o.key, o.value, **masks, return_lse=True, backend=backend)
    return with_gradients(out, lse, o)


def check(problem: Problem, backend: str | None) -> None:
    """The backend's result for a problem is as accurate as its dtype allows.

    A problem beyond the backend's limits must be refused, with the reason that explain() gives.
    """
    why_not = limits(problem, backend)
    if why_not:
        assert_refused(why_not, lambda: evaluate(problem, backend))
    else:
        assert_accurate(evaluate(problem, backend), problem)


def assert_refused(why_not: tuple[str, ...], call: Callable[[], object]) -> None:
    """The call raises with the first of the reasons that explain() gives."""
    with pytest.raises(RuntimeError, match="cannot serve this call") as refused:
        call()
    assert why_not[0] in str(refused.value)


def limits(problem: Problem, backend: str | None) -> tuple[str, ...]:
    """Why the backend does not serve a problem, () when it does."""
    if backend in (None, "cpu", "reference"):  # they serve everything
        return ()
    o = problem.operands()
    masks = o.masks()
    if problem.gate and masks.pop("multiplier") is None:
        masks |= {"mask": masks.pop("bias"), "fusion": "gate"}
    op = "lam_attention" if "mask" in masks else "masked_attention"
    explained = lam_kernels.explain(op, o.query, o.key, o.value, **masks, backend=backend)
    return explained.reasons[backend]


def random_problem(seed: int, dtype: str | None = None) -> Problem:
    """Problem number `seed` of an endless list, small enough that hundreds take a minute."""
    draw = random.Random(seed)

    def sometimes(probability: float) -> bool:
        return draw.random() < probability

    def axes() -> str:
        if sometimes(0.1):
            return "qk"
        return "".join(a if sometimes(0.6) else "1" for a in "bhqk")

    dtype = dtype or draw.choice(
        ("float32", "float32", "bfloat16", "bfloat16", "float16", "float64")
    )
    B, H, Lq, Lk = draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 4, 6)), *draw.choices(LENGTHS, k=2)
    if sometimes(0.5):
        Lk = Lq
    if sometimes(0.08):
        B, H, Lq, Lk = 1, 2, *draw.choices((*LENGTHS, *LONG), k=2)
    D = draw.choice(HEAD_DIMS)
    given = {
        "B": B,
        "H": H,
        "Lq": Lq,
        "Lk": Lk,
        "D": D,
        "Dv": D if sometimes(0.6) else draw.choice(HEAD_DIMS),
    }
    given |= {"dtype": dtype, "seed": seed}
    if sometimes(0.25):
        given["Hkv"] = draw.choice([h for h in range(1, H + 1) if H % h == 0])
    masks = draw.choice(("m", "m", "m", "b", "b", "mb", "mb", "g", "g", ""))
    mask_dtypes = {
        "float64": ("float64", "float32", "bfloat16"),
        "float32": ("float32",) * 3 + HALF,
    }
    for letter, name in (("m", "multiplier"), ("b", "bias"), ("g", "bias")):
        if letter in masks:
            given[name] = axes()
            if sometimes(0.4):
                choices = mask_dtypes.get(dtype, ("float32", *HALF))
                given[f"{name}_dtype"] = draw.choice(choices)
    given["gate"] = masks == "g"
    if sometimes(0.4):
        given["pattern"] = _random_pattern(draw)
    elif sometimes(0.1):
        given["pattern"] = tuple(
            _random_pattern(draw) if sometimes(0.7) else None for _ in range(H)
        )
    if sometimes(0.2):
        given["attn_mask"] = axes()
    given["key_mask"] = sometimes(0.3)
    if sometimes(0.2):
        given["scale"] = draw.choice((0.05, 0.3, 1.0, -0.2, 0.0))
    if sometimes(0.15):
        given["dropout_p"] = draw.choice((0.1, 0.5, 0.9))
    if sometimes(0.1):
        given["spread"] = draw.choice((0.0, 5.0, 20.0))
    if masks == "g":  # its gradient at M = 0 is e^(S - lse): wide scores overflow, and should
        given |= {"scale": None, "spread": min(1.0, given.get("spread", 1.0))}
    for name in ("layout", "mask_layout", "grad_layout"):
        if sometimes(0.35):
            given[name] = draw.choice(LAYOUTS)
    if sometimes(0.3):
        given["grads"] = "".join(letter for letter in "qkvmb" if sometimes(0.5))
    given["lse_grad"] = sometimes(0.3)
    given["fill"] = ",".join(w for w in ("neg_inf", "dead", "nan", "loud") if sometimes(0.3))
    return Problem(**given)


def random_low_rank_problem(seed: int, dtype: str | None = None) -> Problem:
    """Random problem `seed`, one or both of its masks replaced by a LowRankMask."""
    draw = random.Random(f"low rank {seed}")
    given: dict[str, object] = {"gate": False}
    for name in draw.choice((("multiplier",), ("bias",), ("multiplier", "bias"))):
        axes = [draw.choice(("11", "b1", "1h", "bh")) for _ in range(draw.choice((2, 3)))]
        given[name] = f"rank {draw.choice((1, 2, 3, 5, 8, 16, 17, 40, 64, 130))}: {' '.join(axes)}"
    problem = random_problem(seed, dtype)
    if problem.gate and "bias" not in given:
        given["bias"] = None
    return problem.but(**given)


def _random_pattern(draw: random.Random) -> str:
    def term() -> str:
        end = draw.choice(("", "", ", alignment='end'", ", alignment='start'"))
        radius, dilation = draw.choice((0, 1, 5, 30, 70)), draw.choice((1, 2, 3, 7))
        return draw.choice(
            (
                f"BlockDiagonal({draw.choice((1, 4, 16, 50, 64))}{end})",
                f"Toeplitz({radius}{end})",
                f"DilatedToeplitz({radius}, {dilation}{end})",
                f"Causal({end.removeprefix(', ')})",
                f"Segments({draw.choice((1, 3, 10))}{draw.choice(('', ', shuffled=True'))})",
                f"Segments({draw.choice((2, 4))}, shared=True)",
            )
        )

    # two equal terms would be one, so a third of the combinations are shorter than they look
    return " & ".join(term() for _ in range(draw.choice((1, 1, 1, 1, 2, 2, 3))))
