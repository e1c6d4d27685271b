"""What is measured: named cases, and the targets they are held to.

A case is a Problem (python_ref/inputs.py) without its dtype, the peers beside ours, and goals.
Every row of the targets table of the project's first milestone is a case here, and so is every
sentence below that table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# fwd   forward alone, under no_grad
# both  forward and backward, with the gradients that the problem's `grads` names
# call  forward with gradients on, backward not run (host overhead)
DIRECTIONS = ("fwd", "both", "call")

MEASURES = ("time", "overhead", "memory")


@dataclass(frozen=True)
class Goal:
    """`value` must be at most `at_most`.

    time      value = our median / the fastest median among `peers`
    overhead  value = our median - the peer's, in microseconds
    memory    value = our peak in MiB (no peers)
    """

    at_most: float
    peers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    directions: tuple[str, ...] = DIRECTIONS


@dataclass(frozen=True)
class Case:
    """One named measurement, to be done in each of its dtypes and directions."""

    name: str
    section: str  # heading of the table it belongs to, a key of SECTIONS
    problem: dict  # fields of Problem
    peers: tuple[str, ...]  # names in baselines.PEERS; "ours" is always there
    goals: tuple[Goal, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    directions: tuple[str, ...] = ("both",)
    measure: str = "time"
    quick: bool = False  # part of --quick
    sets: tuple[str, ...] = field(default=("foundation",))

    @property
    def label(self) -> str:
        """The problem in one line."""
        p = self.problem
        text = f"B{p['B']} H{p['H']} L{p['Lq']} D{p['D']}"
        for name in ("multiplier", "bias"):
            if p.get(name):
                frozen = "" if name[0] in p.get("grads", "qkvmb") else ", frozen"
                axes = {"b": str(p["B"]), "h": "H", "q": "L", "k": "L", "1": "1"}
                text += f", {name} [{','.join(axes[a] for a in p[name])}]{frozen}"
        return text + (f", {p['pattern']}" if p.get("pattern") else "")

    def goals_of(self, dtype: str, direction: str) -> list[Goal]:
        return [g for g in self.goals if dtype in g.dtypes and direction in g.directions]


SECTIONS = {
    "dense": "Learned multiplicative mask, forward and backward with its gradient",
    "forward": "Forward alone, under no_grad",
    "frozen": "Frozen mask: forward and backward, no mask gradient",
    "no mask": "No mask at all",
    "local": "Local patterns at L 4096",
    "head dim": "Small head dims against D 32",
    "memory": "Peak extra memory: forward and backward, results and cached scratch included",
    "threads": "One thread against two",
    "overhead": "Host overhead of a call on a tiny shape, above a plain autograd.Function",
    "smoke": "Tiny problems that only show that the bench works",
}

# B, H, L, multiplier axes; targets: fp32 over compile, over SDPA without a mask, the same in bf16
_DENSE = {
    "L50": (16, 12, 50, "b1qk", (0.70, 0.70, 0.60, 0.20)),
    "L197": (8, 12, 197, "b1qk", (0.65, 0.75, 0.55, 0.30)),  # ViT-B/16 at 224 pixels
    "L300": (4, 8, 300, "b1qk", (0.60, 0.80, 0.45, 0.35)),
    "L1024": (1, 8, 1024, "11qk", (0.42, 1.00, 0.22, 0.45)),
    "L4096": (1, 8, 4096, "11qk", (0.40, 1.00, 0.20, 0.50)),
}
_QUICK = ("L50", "L197", "L1024")


def _shape(B: int, H: int, L: int, D: int = 64, **rest) -> dict:
    return dict(B=B, H=H, Lq=L, D=D, **rest)


def _foundation() -> list[Case]:
    cases = []
    for name, (B, H, L, axes, (fp32_compile, fp32_sdpa, bf16_compile, bf16_sdpa)) in _DENSE.items():
        quick = name in _QUICK
        learned = _shape(B, H, L, multiplier=axes)
        cases += [
            Case(
                f"dense-{name}",
                "dense",
                learned,
                ("compile", "sdpa_nomask", "eager"),
                (
                    Goal(fp32_compile, ("compile",), ("fp32",)),
                    Goal(fp32_sdpa, ("sdpa_nomask",), ("fp32",)),
                    Goal(bf16_compile, ("compile",), ("bf16",)),
                    Goal(bf16_sdpa, ("sdpa_nomask",), ("bf16",)),
                ),
                quick=quick,
            ),
            Case(
                f"forward-{name}",
                "forward",
                learned,
                ("sdpa_nomask",),
                (Goal(1.05, ("sdpa_nomask",)),),
                directions=("fwd",),
                quick=quick,
            ),
            Case(
                f"frozen-{name}",
                "frozen",
                learned | {"grads": "qkv"},
                ("sdpa_nomask",),
                (Goal(1.05, ("sdpa_nomask",)),),
                quick=name == "L1024",
            ),
            Case(
                f"nomask-{name}",
                "no mask",
                _shape(B, H, L),
                ("sdpa_nomask",),
                (Goal(1.00, ("sdpa_nomask",)),),
                directions=("both", "fwd"),
                quick=name == "L1024",
            ),
        ]

    # not windows64_compile: its backward gives a wrong dK (torch 2.13), so check.py refuses it
    blocked = ("blocks64_compile", "blocks128_compile")
    reshaped = ("reshaped_compile",)
    for learned, bias in (("bias", "1h1k"), ("nomask", None)):
        cases += [
            Case(
                f"toeplitz64-{learned}",
                "local",
                _shape(1, 8, 4096, bias=bias, pattern="Toeplitz(64)"),
                (*blocked, "blocks64"),
                (Goal(0.30, blocked),),
                quick=bias is not None,
            ),
            Case(
                f"blockdiagonal64-{learned}",
                "local",
                _shape(1, 8, 4096, bias=bias, pattern="BlockDiagonal(64)"),
                (*reshaped, "reshaped", *(() if bias else ("reshaped_sdpa",))),
                (Goal(0.90, reshaped),),
                quick=bias is not None,
            ),
        ]

    for name in ("L197", "L1024"):
        B, H, L, axes, _ = _DENSE[name]
        for D in (16, 24):
            cases.append(
                Case(
                    f"headdim{D}-{name}",
                    "head dim",
                    _shape(B, H, L, D, multiplier=axes),
                    ("ours_d32",),
                    (Goal(1.00, ("ours_d32",)),),
                    quick=name == "L197",
                )
            )

    cases.append(
        Case(
            "memory-L4096",
            "memory",
            _shape(1, 8, 4096, multiplier="11qk"),
            ("compile", "eager", "sdpa_nomask"),
            (Goal(120.0),),
            dtypes=("fp32",),
            measure="memory",
        )
    )
    for name in ("L197", "L1024"):
        B, H, L, axes, _ = _DENSE[name]
        cases.append(
            Case(
                f"threads-{name}",
                "threads",
                _shape(B, H, L, multiplier=axes),
                ("ours_1thread",),
                (Goal(1 / 1.8, ("ours_1thread",)),),
                quick=name == "L1024",
            )
        )
    cases.append(
        Case(
            "overhead-tiny",
            "overhead",
            _shape(1, 1, 4, 8, multiplier="11qk"),
            ("plain_function",),
            (Goal(20.0, ("plain_function",)),),
            dtypes=("fp32",),
            directions=("call", "both"),
            measure="overhead",
            quick=True,
        )
    )
    return cases


def _smoke() -> list[Case]:
    sets = ("smoke",)
    dense = _shape(2, 2, 17, 8, multiplier="b1qk")
    local = _shape(1, 2, 256, 8, bias="1h1k", pattern="Toeplitz(64)")
    block = _shape(1, 2, 256, 8, bias="1h1k", pattern="BlockDiagonal(64)")
    return [
        Case("smoke-dense", "smoke", dense, ("eager", "sdpa_nomask", "compile"),
             (Goal(1.0, ("eager",)),), directions=("both", "fwd"), sets=sets),
        Case("smoke-local", "smoke", local, ("blocks64", "blocks128", "windows64", "eager"),
             sets=sets),
        Case("smoke-block", "smoke", block, ("reshaped", "eager"), sets=sets),
        Case("smoke-nomask", "smoke", _shape(1, 2, 256, 8, pattern="BlockDiagonal(64)"),
             ("reshaped_sdpa",), sets=sets),
        Case("smoke-self", "smoke", dense, ("ours_d32", "ours_1thread"), sets=sets),
        Case("smoke-overhead", "smoke", dense, ("plain_function",),
             (Goal(20.0, ("plain_function",)),), ("fp32",), ("call", "both"), "overhead",
             sets=sets),
        Case("smoke-memory", "smoke", dense, ("eager",), (Goal(120.0),), ("fp32",),
             measure="memory", sets=sets),
    ]  # fmt: skip


CASES = {case.name: case for case in (*_foundation(), *_smoke())}
SETS = ("foundation", "smoke")


def select(set_name: str, quick: bool = False, names: list[str] | None = None) -> list[Case]:
    """The cases of a set; or those that match a name, a part of it, or a glob: of that set if it
    has any, else of all.

    Raises ValueError when a name matches nothing.
    """
    if not names:
        return [c for c in CASES.values() if set_name in c.sets and (c.quick or not quick)]
    chosen = []
    for wanted in names:
        for pool in ([c for c in CASES.values() if set_name in c.sets], CASES.values()):
            found = [c for c in pool if fnmatch(c.name, wanted)]
            found = found or [c for c in pool if wanted in c.name]
            if found:
                break
        if not found:
            raise ValueError(f"no case matches {wanted!r}: `python -m bench list` shows them")
        chosen += [c for c in found if c not in chosen]
    return chosen
