"""Every entry of the configuration table gives right results, whatever the rule would have chosen;
the rule itself; splits of a sum over many sharers; the order of programs."""

from __future__ import annotations

import pytest
import torch
import two_maps
from problems import check
from score_networks import case as network_case
from score_networks import check as check_network

from lam_kernels.triton import configurations
from lam_kernels.triton.configurations import (
    AMPERE,
    AMPERE_LOW_RANK,
    LOW_RANK,
    SCORE,
    SHORT,
    TABLE,
    Configuration,
)
from python_ref.inputs import Problem

pytestmark = pytest.mark.backend("triton")
pytest.importorskip("triton")

DTYPES = {2: "bfloat16", 4: "float32"}
# In the interpreter a tile of 64 x 64 costs as much as a small one, a larger one more.
ORDINARY = {("forward", 2, 64), ("rows", 2, 64), ("columns", 2, 32), ("tiles", 4, 64)}

ENTRIES = [
    pytest.param(
        kernel,
        entry,
        width,
        head_dim,
        id=f"{kernel}-{DTYPES[width]}-{head_dim}-{'x'.join(map(str, entry))}",
        marks=()
        if torch.cuda.is_available() or (kernel, width, head_dim) in ORDINARY
        else pytest.mark.full,
    )
    for kernel, rows in TABLE.items()
    for (width, head_dim), entries in rows.items()
    for entry in dict.fromkeys((*entries, *AMPERE.get((kernel, width, head_dim), ())))
]


@pytest.fixture
def general(monkeypatch):
    """No head goes to the kernels for short ones."""
    monkeypatch.setattr(configurations, "short", lambda *_: (0, 0))


@pytest.mark.parametrize(("kernel", "entry", "width", "head_dim"), ENTRIES)
def test_entry(kernel, entry, width, head_dim, monkeypatch, general):
    usual = configurations.choose

    def choose(problem, device):
        return entry if problem.kernel == kernel else usual(problem, device)

    monkeypatch.setattr(configurations, "choose", choose)
    sizes = {"B": 1, "H": 2, "Lq": 70, "Lk": 130} if entry.block_m <= 64 else {"B": 1, "Lq": 150}
    sizes |= {"D": head_dim, "dtype": DTYPES[width], "key_mask": True}
    if kernel.startswith("map_gated"):
        length = {"Lq": sizes["Lq"], "Lk": None}
        two_maps.check(two_maps.gated(**sizes | length, pattern="Toeplitz(9)"), "triton")
        return
    sizes |= {"multiplier": "11qk", "bias": "b11k"}
    if kernel.startswith("global_local"):
        two_maps.check(two_maps.both(**sizes, pattern="Toeplitz(9)"), "triton")
    else:
        check(Problem(**sizes), "triton")


LOW_RANK_ENTRIES = [
    pytest.param(kernel, entry, width, head_dim, marks=marks)
    for table in (LOW_RANK, AMPERE_LOW_RANK)
    for (kernel, width, head_dim), entries in table.items()
    for entry in entries
    for marks in [() if torch.cuda.is_available() else pytest.mark.full]
]


@pytest.mark.parametrize(("kernel", "entry", "width", "head_dim"), LOW_RANK_ENTRIES)
def test_low_rank_entry(kernel, entry, width, head_dim, monkeypatch, general):
    usual = configurations.choose

    def choose(problem, device):
        assert problem.low_rank
        return entry if problem.kernel == kernel else usual(problem, device)

    monkeypatch.setattr(configurations, "choose", choose)
    masks = {"multiplier": "rank 64: 11 11 11", "bias": "rank 3: b1 1h", "key_mask": True}
    problem = Problem(B=1, H=2, Lq=70, Lk=130, D=head_dim, dtype=DTYPES[width], **masks)
    check(problem, "triton")


@pytest.mark.parametrize(
    ("kernel", "width", "entry"),
    [
        pytest.param(
            kernel,
            width,
            entry,
            marks=() if torch.cuda.is_available() or width == 16 else pytest.mark.full,
        )
        for kernel, columns in SCORE.items()
        for width, entries in columns.items()
        for entry in entries
    ],
)
def test_network_entry(kernel, width, entry, monkeypatch):
    usual = configurations.score

    def score(wanted, *sizes):
        return entry if wanted == kernel else usual(wanted, *sizes)

    monkeypatch.setattr(configurations, "score", score)
    sizes = {"B": 1, "H": 2, "Lq": 70, "Lk": width - 3, "D": 24, "hidden": width}
    check_network(network_case(**sizes, depth=3, key_mask=True), "triton")


def test_programs_of_a_network():
    """Two a multiprocessor (the interpreter has four), no more than there is scratch for."""
    device = torch.device("cpu")
    assert configurations.score_programs(100, 5, 1000, device) == (8, 1)
    assert configurations.score_programs(2, 10, 1000, device) == (2, 4)
    assert configurations.score_programs(2, 3, 1000, device) == (2, 3)
    assert configurations.score_programs(100, 5, 3, device) == (3, 1)
    assert configurations.score_programs(100, 5, 0, device) == (1, 1)


@pytest.mark.parametrize("length", [1, 5, 17, 31, 49, 64])
@pytest.mark.parametrize(("width", "head_dim"), [(2, 64), (4, 32)])
def test_short_heads(length, width, head_dim, monkeypatch):
    monkeypatch.setattr(configurations, "short", lambda *_: SHORT[width, head_dim])
    masks = {"multiplier": "b1qk", "bias": "1hqk", "key_mask": True, "fill": "nan"}
    problem = Problem(B=3, H=3, Lq=length, D=24, dtype=DTYPES[width], **masks, lse_grad=True)
    check(problem, "triton")


@pytest.mark.parametrize(
    "pattern",
    [
        None,
        *(
            pytest.param(p, marks=pytest.mark.full)
            for p in ("Toeplitz(9)", "DilatedToeplitz(20, 2)")
        ),
    ],
)
def test_partial_sums(pattern, monkeypatch):
    """A shared mask's gradient in one part, in several, and in more than there are sharers."""
    for parts in (1, 3, 100):
        monkeypatch.setattr(
            configurations, "splits", lambda _, sharers, *rest, parts=parts: min(parts, sharers)
        )
        masks = {"multiplier": "11qk", "bias": "1hqk", "pattern": pattern}
        check(Problem(B=2, H=2, Lq=40, D=16, **masks), "triton")


@pytest.mark.parametrize("axes", ["b1qk", "1hqk", "11qk", "bhqk"])
def test_order_of_programs(axes, general):
    check(Problem(B=2, H=3, Lq=40, Lk=35, D=16, multiplier=axes), "triton")


def test_partial_sums_stay_small():
    device = torch.device("cpu")
    assert configurations.splits(4, 5120, 4 * 64 * 64, 10**9, device) > 1
    assert configurations.splits(10**6, 32, 4096**2, 10**9, device) == 1
    assert configurations.splits(1, 32, 4096**2, 4096**2, device) == 1


def test_cost_counts_padding_and_waves():
    def cost(entry, **changes):
        sizes = {"kernel": "forward", "width": 2, "head_dim": 64, "Lq": 4096, "Lk": 4096}
        problem = configurations.Problem(**{**sizes, "pairs": 32, **changes})
        return configurations.cost(problem, Configuration(*entry), 132)

    wide, narrow = (128, 64, 4, 3), (64, 64, 4, 3)
    assert cost(wide) < 1.1 * cost(narrow)
    assert cost(narrow, Lq=64, pairs=4096) < cost(wide, Lq=64, pairs=4096)  # half padding
    assert cost(narrow, pairs=1, Lq=4096) < cost(wide, pairs=1, Lq=4096)  # too few programs


def test_shared_memory_of_a_chip():
    limits = {cc: configurations.shared_limit(cc) for cc in ((8, 0), (8, 6), (9, 0), (10, 0))}
    assert limits == {(8, 0): 166_912, (8, 6): 101_376, (9, 0): 232_448, (10, 0): 232_448}
    assert configurations.shared_limit((12, 0)) == 101_376
