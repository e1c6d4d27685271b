"""W1 to W22: the attention calls of the models behind this package, by name.

`batch` and everything else is what the model trains with. On a CPU the batch is halved until a call
has at most 2^24 pairs (`on_cpu`), so that a whole list takes minutes; the row's label says what was
measured. `--batch N` or `--batch full` decides otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU_PAIRS = 2**24


@dataclass(frozen=True)
class Part:
    """One call of a workload: an op and a problem of its page."""

    name: str  # "" for the only one
    problem: dict
    op: str = "masked_attention"
    why_not: str = ""  # why this version cannot be asked for it, beyond a missing op


@dataclass(frozen=True)
class Workload:
    name: str
    source: str
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...] = ("both",)
    note: str = ""


def _part(name: str = "", op: str = "masked_attention", **problem) -> Part:
    return Part(name, problem, op)


def _dg_sct(write: bool) -> tuple[Part, ...]:
    """Latent tokens and one stage of Swin (then of HTS-AT): read is tokens <- source, write back.

    The widths from 384 on are above the op's largest head dim: their rows say so.
    """
    parts = []
    for model, sizes in (
        ("swin", ((2304, 192), (576, 384), (144, 768), (36, 1536))),
        ("htsat", ((4096, 96), (1024, 192), (256, 384), (64, 768))),
    ):
        for stage, (length, width) in enumerate(sizes, 1):
            Lq, Lk = (length, 32) if write else (32, length)
            parts.append(_part(f"{model}{stage}", B=80, H=1, Lq=Lq, Lk=Lk, D=width, scale=1.0))
    return tuple(parts)


def _windows(sizes, side: int, **rest) -> tuple[Part, ...]:
    """Window attention of each stage; the first stage also shifted. Bias [1,H,L,L]."""
    parts = []
    for stage, (rows, columns, images, heads, length) in enumerate(sizes, 1):
        problem = dict(B=rows * columns * images, H=heads, Lq=length, bias="1hqk", **rest)
        parts.append(Part(f"stage{stage}", problem))
        if stage == 1:
            shifted = problem | {"pattern": f"Windows({rows}, {columns}, {side}, {side // 2})"}
            parts.append(Part("stage1-shifted", shifted))
    return tuple(parts)


_DUAL = "global_local_attention"

WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "AD, audio-visual encoder (LAM)",
                 (_part(B=32, H=12, Lq=50, D=64, multiplier="b1qk"),), ("bf16",), note="x16"),
        Workload("W2", "AD, adapter in front of the language model",
                 (_part(B=32, H=16, Lq=66, D=32),), ("bf16",), note="x8"),
        Workload("W3", "LLaMA with adapter, training: causal, gated second softmax",
                 (_part(op="prefix_gated_attention", B=32, H=32, Lq=128, Lk=128, D=128),),
                 ("bf16",), note="x31"),
        Workload("W4", "LLaMA with adapter, decoding: one query, no mask",
                 (_part(op="prefix_gated_attention", B=8, H=32, Lq=1, Lk=512, D=128),),
                 ("bf16",), ("fwd",)),
        Workload("W5", "QD-DETR text to video: the mask is an MLP of the score row, 32 layers",
                 (_part(op="score_masked_attention", B=32, H=8, Lq=75, Lk=32, D=32, depth=32,
                        hidden=32, key_mask=True),), ("fp32",), note="x2; B 64 with negatives"),
        Workload("W6", "QD-DETR encoder (LAM)",
                 (_part(B=32, H=8, Lq=76, D=32, multiplier="b1qk", key_mask=True),), ("fp32",),
                 note="x2; B 64 with negatives"),
        Workload("W7", "QD-DETR decoder, cross attention",
                 (_part(B=32, H=8, Lq=10, Lk=75, D=64, Dv=32, key_mask=True),), ("fp32",)),
        Workload("W8", "ViT-B/16 (LAM)",
                 (_part(B=128, H=12, Lq=197, D=64, multiplier="b1qk"),), ("fp16",), note="x12"),
        Workload("W9", "SwinBERT, one fixed learned mask for all samples",
                 (_part(B=6, H=12, Lq=834, D=64, multiplier="11qk", attn_mask="text(50)"),),
                 ("fp16",), note="x12; without its dropout of 0.1"),
        Workload("W10", "SwinBERT with LAM: a mask for each sample",
                 (_part(B=2, H=12, Lq=834, D=64, multiplier="b1qk", attn_mask="text(50)"),),
                 ("fp16",)),
        Workload("W11", "SwinBERT, 64 frames",
                 (_part(B=2, H=12, Lq=1618, D=64, multiplier="11qk", attn_mask="text(50)"),),
                 ("fp16",)),
        Workload("W12", "GMSA visual stream: global and local",
                 (_part(op=_DUAL, B=64, H=8, Lq=300, D=128, pattern="Toeplitz(15)"),),
                 ("fp32", "bf16")),
        Workload("W13", "GMSA audio stream: global and local",
                 (_part(op=_DUAL, B=64, H=8, Lq=300, D=16, pattern="Toeplitz(15)"),),
                 ("fp32", "bf16")),
        Workload("W14", "GMSA with GateAtt: both maps gated by learned [300,300] weights",
                 (_part("visual", "map_gated_attention", B=64, H=8, Lq=300, D=128,
                        pattern="Toeplitz(15)"),
                  _part("audio", "map_gated_attention", B=64, H=8, Lq=300, D=16,
                        pattern="Toeplitz(15)")), ("fp32", "bf16")),
        Workload("W15", "DG-SCT latent tokens read a stage", _dg_sct(False), ("fp32",)),
        Workload("W16", "DG-SCT latent tokens write to a stage", _dg_sct(True), ("fp32",)),
        Workload("W17", "DG-SCT gates: alpha Mc + beta Ms + kappa",
                 (Part("", {}, why_not="elementwise, no attention: no op of this package"),),
                 ("fp32",)),
        Workload("W18", "Swin-V2 windows: a scale for each head, a bias; frozen",
                 _windows(((4, 4, 80, 6, 144), (2, 2, 80, 12, 144), (1, 1, 80, 24, 144),
                           (1, 1, 80, 48, 36)), 12, D=32, multiplier="1h11", grads="qkv"),
                 ("fp32", "fp16"), note="forward and gradients of query, key and value"),
        Workload("W19", "HTS-AT windows: learned bias, D 24",
                 _windows(((8, 8, 80, 4, 64), (4, 4, 80, 8, 64), (2, 2, 80, 16, 64),
                           (1, 1, 80, 32, 64)), 8, D=24), ("fp32",)),
        Workload("W20", "few-shot CLIP", (_part(B=20, H=12, Lq=50, D=64),), ("fp32",)),
        Workload("W21", "AVQA question: one query, D 384",
                 (_part(B=8, H=4, Lq=1, Lk=10, D=384),), ("fp32",)),
        Workload("W22", "long sequences, beyond the papers",
                 (_part("mul", B=4, H=8, Lq=4096, D=64, multiplier="b1qk"),
                  _part("add", B=4, H=8, Lq=4096, D=64, bias="b1qk")), ("bf16",)),
    )
}  # fmt: skip


def on_cpu(problem: dict) -> dict:
    """The problem with its batch halved until a call has at most CPU_PAIRS pairs.

    Windows of one image stay together.
    """
    batch, sample = problem["B"], problem["H"] * problem["Lq"] * problem.get("Lk", problem["Lq"])
    least = 1
    if str(problem.get("pattern")).startswith("Windows("):
        rows, columns = problem["pattern"].removeprefix("Windows(").split(",")[:2]
        least = int(rows) * int(columns)
    while batch > least and batch * sample > CPU_PAIRS:
        batch = max(least, batch // 2 // least * least)
    return problem | {"B": batch}
