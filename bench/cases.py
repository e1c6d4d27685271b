"""What is measured: named cases in named sets, and the targets they are held to.

A case is a problem of its op's page without its dtype, the peers beside ours, and goals.

overview    what `make bench` measures in five minutes: time and memory over the length, the short
            workloads, local patterns
workloads   W1 to W22 (workloads.py)
foundation  the held targets of the first milestone: every row of its table, every sentence below
low-rank    masks that are never stored (never_stored.py): by their factors, by a network of the
            scores
windows     window attention at the sizes of Swin and HTS-AT
lengths     time and memory over L, finer and with more peers than the overview
two-maps    the targets of global and local attention together (two_map_cases.py)
gpu         what a CUDA machine is asked
smoke       tiny problems that only show that the bench works
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch

from . import never_stored
from .workloads import WORKLOADS

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DIRECTIONS = ("fwd", "bwd", "both", "call")  # contender.DIRECTIONS says what they are

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
    problem: dict  # fields of the Problem of its op's page, without the dtype
    peers: tuple[str, ...] | None = ()  # in the page's PEERS; None: the page's usual_peers
    goals: tuple[Goal, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    directions: tuple[str, ...] = ("both",)
    measure: str = "time"
    quick: bool = False  # part of --quick
    sets: tuple[str, ...] = field(default=("foundation",))
    op: str = "masked_attention"
    why_not: str = ""  # why it cannot be measured at all: its only row then

    def goals_of(self, dtype: str, direction: str) -> list[Goal]:
        return [g for g in self.goals if dtype in g.dtypes and direction in g.directions]


SECTIONS = {
    "lengths": "Time over the length",
    "memory lengths": "Memory over the length",
    "workloads": "Attention calls of real models",
    "patterns": "Local patterns",
    "low rank": "Masks that are never stored",
    "score": "The mask as a network of the scores, inside the kernel",
    "low rank memory": "Masks that are never stored: peak extra memory",
    "windows": "Many windows in one call",
    "given": "Problems given on the command line",
    "dense": "Learned multiplicative mask, forward and backward with its gradient",
    "forward": "Forward alone, under no_grad",
    "frozen": "Frozen mask: forward and backward, no mask gradient",
    "no mask": "No mask at all",
    "local": "Local patterns at L 4096",
    "head dim": "Small head dims against D 32",
    "memory": "Peak extra memory: forward and backward, results and cached scratch included",
    "threads": "One thread against two",
    "overhead": "Host overhead of a call on a tiny shape, above a plain autograd.Function",
    "two maps": "Global and local attention together",
    "gpu": "On a CUDA machine",
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


_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_OVERVIEW_LENGTHS = (128, 256, 512, 1024, 2048)
_OVERVIEW_PEAKS = (512, 1024, 2048)
_OVERVIEW_WORKLOADS = ("W1", "W6", "W8", "W10", "W19-stage1-shifted")


def _lengths() -> list[Case]:
    """One sample of 8 heads with a mask that they share, from short to long."""
    steps, forwards, memory = [], [], []
    for L in _LENGTHS:
        problem = _shape(1, 8, L, multiplier="11qk")
        eager = ("eager",) if L <= 2048 else ()  # seconds a call above
        peers = ("compile", "sdpa_nomask", *eager)
        step = ("lengths", *(("overview",) if L in _OVERVIEW_LENGTHS else ()))
        peak = ("lengths", *(("overview",) if L in _OVERVIEW_PEAKS else ()))
        quick = L <= 1024
        steps.append(Case(f"length-L{L}", "lengths", problem, peers, quick=quick, sets=step))
        forwards.append(
            Case(f"length-forward-L{L}", "lengths", problem, peers, directions=("fwd",),
                 quick=quick, sets=("lengths",))
        )  # fmt: skip
        memory.append(
            Case(f"peak-L{L}", "memory lengths", problem, peers, dtypes=("fp32",),
                 measure="memory", quick=quick, sets=peak)
        )  # fmt: skip
    return [*steps, *forwards, *memory]


def _patterns() -> list[Case]:
    shape = {"bias": "1h1k"}
    return [
        Case("toeplitz64-L2048", "patterns", _shape(1, 8, 2048, pattern="Toeplitz(64)", **shape),
             ("blocks64_compile", "sdpa"), dtypes=("fp32",), sets=("overview",)),
        Case("dilated64by4-L4096", "patterns",
             _shape(1, 8, 4096, pattern="DilatedToeplitz(64, 4)", **shape),
             ("strided64_compile", "strided64"), sets=()),
    ]  # fmt: skip


def _low_rank() -> list[Case]:
    """A multiplier of rank 64 by its factors, against the dense one and PyTorch's product."""
    cases = []
    for L, of_dense, of_compile, mib in ((1024, 1.0, 0.4, 16.0), (4096, 0.9, 0.4, 60.0)):
        problem = _shape(1, 8, L, multiplier="rank 64: 11 11 11")
        goals = (Goal(of_dense, ("ours_dense",)), Goal(of_compile, ("compile",)))
        peers = ("ours_dense", "ours_product", "compile")
        cases += [
            Case(f"rank64-L{L}", "low rank", problem, peers, goals, sets=("low-rank",)),
            Case(f"rank64-peak-L{L}", "low rank memory", problem, peers, (Goal(mib),),
                 dtypes=("fp32",), measure="memory", sets=("low-rank",)),
        ]  # fmt: skip
    return cases


def _windows() -> list[Case]:
    """Many windows in one call at the sizes of W18 and W19, four images at a time."""
    goals = (Goal(0.6, ("eager",)), Goal(0.8, ("compile",)))
    swin = _shape(64, 6, 144, 32, bias="1hqk")
    htsat = _shape(256, 4, 64, 24, bias="1hqk")
    return [
        Case(name, "windows", problem, ("compile", "eager", "sdpa"), goals, dtypes=("fp32",),
             sets=("windows",), op="window_attention")
        for name, problem in (
            ("window-W18", swin),
            ("window-W18-shifted", swin | {"pattern": "Windows(4, 4, 12, 6)"}),
            ("window-W19", htsat),
            ("window-W19-shifted", htsat | {"pattern": "Windows(8, 8, 8, 4)"}),
        )
    ]  # fmt: skip


def _workloads() -> list[Case]:
    cases = []
    for workload in WORKLOADS.values():
        for part in workload.parts:
            name = f"{workload.name}-{part.name}" if part.name else workload.name
            overview = ("overview",) if name in _OVERVIEW_WORKLOADS else ()
            cases.append(
                Case(name, "workloads", part.problem, None, dtypes=workload.dtypes,
                     directions=workload.directions, sets=("workloads", *overview), op=part.op,
                     why_not=part.why_not)
            )  # fmt: skip
    return cases


def _band_share(L: int, radius: int, dilation: int) -> float:
    """Visible pairs of a dilated band / all pairs."""
    before = sum(min(i, radius) // dilation for i in range(L))
    return (2 * before + L) / L**2


# Calls of W1, W5, W6, W8, W12, W18 and W19 with a learned mask and its gradient, as one call of
# masked_attention each: what docs/cuda_kernels.md predicts for them is tested by these cases.
_GPU_SHORT = {
    "W1": _shape(32, 12, 50, multiplier="b1qk"),
    "W5": _shape(32, 8, 75, 32, Lk=32, multiplier="b1qk"),
    "W6": _shape(32, 8, 76, 32, multiplier="b1qk", key_mask=True),
    "W8": _shape(128, 12, 197, multiplier="b1qk"),
    "W12": _shape(64, 8, 300, 128, multiplier="11qk"),
    "W18-stage1": _shape(1280, 6, 144, 32, bias="1hqk"),
    "W19-stage1": _shape(5120, 4, 64, 24, bias="1hqk"),
}


def _gpu() -> list[Case]:
    """What an H200 is held to: ratios in one run, bf16."""
    sets, half = ("gpu",), ("bf16",)
    fused = ("sdpa_nomask", "sdpa_nomask_cudnn", "sdpa_nomask_flash")
    cases = []

    def against(forward: float, step: float) -> tuple[Goal, ...]:
        return (Goal(1 / forward, fused, half, ("fwd",)), Goal(1 / step, fused, half, ("both",)))

    flex = (Goal(1 / 1.3, ("flex",), half, ("fwd",)), Goal(1 / 5, ("flex",), half, ("both",)))
    for L, B, H, D in ((1024, 4, 16, 64), (4096, 4, 16, 64), (8192, 1, 16, 128)):
        long = L >= 4096
        cases.append(
            Case(f"gpu-shared-L{L}-D{D}", "gpu", _shape(B, H, L, D, multiplier="b1qk"),
                 (*fused, "flex", "sdpa_floatmask_grad", "compile"),
                 (*flex, *(against(0.65, 0.45) if long else ())), half, ("fwd", "both"),
                 sets=sets)
        )  # fmt: skip
    cases.append(
        Case("gpu-each-L4096-D128", "gpu", _shape(1, 16, 4096, 128, multiplier="bhqk"),
             (*fused, "flex", "compile"), against(0.55, 0.40), half, ("fwd", "both"), sets=sets)
    )  # fmt: skip
    # a pattern is held to a share of the speed-up that its visible pairs allow, over ours without
    L = 8192
    for name, pattern, visible, share in (
        ("blocks", "BlockDiagonal(256)", 256 / L, 0.85),
        ("band", "Toeplitz(512)", _band_share(L, 512, 1), 0.60),
        ("dilated", "DilatedToeplitz(2048, 4)", _band_share(L, 2048, 4), 0.55),
    ):
        cases.append(
            Case(f"gpu-{name}-L{L}", "gpu", _shape(1, 16, L, 128, bias="1h1k", pattern=pattern),
                 ("ours_everywhere", "flex", "natten"),
                 (Goal(visible / share, ("ours_everywhere",), half),), half, ("fwd", "both"),
                 sets=sets)
        )  # fmt: skip
    # ours is "cuda" wherever that was built
    goals = (
        Goal(1 / 1.3, ("ours:triton",), half, ("both",)),
        Goal(1 / 3, ("flex", "sdpa_floatmask_grad"), half, ("both",)),
        Goal(1 / 5, ("eager",), half, ("both",)),
    )
    peers = ("ours:triton", "flex", "sdpa_floatmask_grad", "eager", "compile")
    cases += [
        Case(f"gpu-{name}", "gpu", problem, peers, goals, half, ("fwd", "both"), sets=sets)
        for name, problem in _GPU_SHORT.items()
    ]
    return cases


def _two_maps() -> list[Case]:
    from .two_map_cases import two_map_cases  # a file of its own, which needs what is defined here

    return two_map_cases()


CASES = {
    case.name: case
    for case in (
        *_lengths(), *_workloads(), *_patterns(), *_low_rank(), *_windows(), *_foundation(),
        *_two_maps(), *never_stored.cases(Case, Goal), *_gpu(), *_smoke(),
    )
}  # fmt: skip
SETS = (
    "overview", "workloads", "lengths", "foundation", "low-rank", "windows",
    "two-maps", "gpu", "smoke",
)  # fmt: skip


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
