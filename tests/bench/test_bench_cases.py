"""The cases are what the project promised to measure; contenders compute what they claim."""

from pathlib import Path

import pytest
import torch

from bench import check, contender, measure, ops, timing
from bench.cases import CASES, DTYPES, MEASURES, SECTIONS, Case, Goal, select
from bench.ops import masked_attention as page
from bench.workloads import CPU_PAIRS, WORKLOADS, on_cpu
from python_ref.inputs import Problem

ROOT = Path(__file__).resolve().parents[2]
# The targets table as it was set: shape; fp32 over compile, over SDPA; the same in bf16.
PROMISED = {
    "dense-L50": ("B16 H12 L50 D64", 0.70, 0.70, 0.60, 0.20),
    "dense-L197": ("B8 H12 L197 D64", 0.65, 0.75, 0.55, 0.30),
    "dense-L300": ("B4 H8 L300 D64", 0.60, 0.80, 0.45, 0.35),
    "dense-L1024": ("B1 H8 L1024 D64", 0.42, 1.00, 0.22, 0.45),
    "dense-L4096": ("B1 H8 L4096 D64", 0.40, 1.00, 0.20, 0.50),
}


@pytest.mark.parametrize("name", PROMISED)
def test_the_targets_table(name):
    case, (shape, *targets) = CASES[name], PROMISED[name]
    assert page.label(Problem(**case.problem)).startswith(shape)
    found = [
        goal.at_most
        for dtype in ("fp32", "bf16")
        for peer in ("compile", "sdpa_nomask")
        for goal in case.goals_of(dtype, "both")
        if goal.peers == (peer,)
    ]
    assert found == targets


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cases_are_well_formed(case):
    assert case.section in SECTIONS
    assert case.measure in MEASURES
    assert case.op in ops.NAMES
    if case.why_not or ops.missing(case.op):
        return
    peers = ops.page(case.op).PEERS
    assert {contender.split_name(peer)[0] for peer in case.peers or ()} <= peers.keys()
    assert all(set(goal.peers) <= set(case.peers) for goal in case.goals)
    for dtype in case.dtypes:
        problem = measure.problem_of(case, dtype)
        assert ops.page(case.op).Problem.parse(repr(problem)) == problem
        assert "ours" not in ops.page(case.op).usual_peers(problem, "cpu", "both")
        for direction in case.directions:
            if "foundation" in case.sets:
                assert case.goals_of(dtype, direction), "a case without a target"


def test_every_sentence_below_the_table_has_a_case():
    sections = {case.section for case in select("foundation")}
    others = {case.section for case in CASES.values() if "foundation" not in case.sets}
    assert sections == SECTIONS.keys() - others - {"given"}
    one = {name: {goal.at_most for goal in CASES[name].goals} for name in CASES}
    assert one["toeplitz64-bias"] == one["toeplitz64-nomask"] == {0.30}
    assert one["blockdiagonal64-bias"] == one["blockdiagonal64-nomask"] == {0.9}
    assert one["headdim16-L197"] == one["headdim24-L1024"] == {1.0}
    assert one["forward-L1024"] == one["frozen-L4096"] == {1.05}
    assert one["nomask-L300"] == {1.0}
    assert one["memory-L4096"] == {120.0}
    assert one["threads-L1024"] == {1 / 1.8}
    assert one["overhead-tiny"] == {20.0}
    assert "m" not in CASES["frozen-L197"].problem["grads"]


def test_select():
    assert [c.name for c in select("foundation", names=["dense-L50"])] == ["dense-L50"]
    assert {c.name for c in select("foundation", names=["dense-*"])} == set(PROMISED)
    assert len(select("foundation", names=["toeplitz", "toeplitz64-bias"])) == 2
    assert 0 < len(select("foundation", quick=True)) < len(select("foundation"))
    assert [c.name for c in select("foundation", names=["memory"])] == ["memory-L4096"]
    assert [c.name for c in select("foundation", names=["smoke-memory"])] == ["smoke-memory"]
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        select("foundation", names=["nothing"])


def _errors(name, problem, direction="both", backend="reference"):
    one = contender.contender(page, name, problem, direction, backend, page.draw)
    mine = one.peer.problem(problem)
    parts = one.peer.expected(mine, "cpu") if one.peer.expected else None
    return check.problems_in(one.result(), page, mine, parts=parts)


DENSE = Problem(B=2, H=2, Lq=9, D=4, multiplier="b1qk")
ADDED = Problem(B=2, H=2, Lq=9, D=4, bias="1hqk")
FACTORS = Problem(B=2, H=2, Lq=9, D=4, multiplier="rank 3: b1 11 1h")
PADDED = Problem(B=2, H=2, Lq=9, Lk=12, D=4, Dv=6, multiplier="b1qk", key_mask=True)
WORDS = Problem(B=2, H=2, Lq=9, D=4, multiplier="11qk", attn_mask="text(4)")
SHIFTED = Problem(B=8, H=2, Lq=16, D=4, bias="1hqk", pattern="Windows(2, 2, 4, 2)")
DILATED = Problem(B=2, H=2, Lq=256, D=4, bias="1h1k", pattern="DilatedToeplitz(64, 4)")
BAND = Problem(B=1, H=2, Lq=256, D=4, bias="1h1k", pattern="Toeplitz(64)")
BLOCKS = Problem(B=2, H=2, Lq=128, D=4, bias="1h1k", pattern="BlockDiagonal(32)")


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ours", DENSE),
        ("eager", DENSE),
        ("eager", BAND),
        ("sdpa_nomask", DENSE),
        *((name, p) for name in ("ours", "eager") for p in (ADDED, PADDED, WORDS, SHIFTED)),
        ("ours", FACTORS),
        ("eager", FACTORS),
        ("ours_dense", FACTORS),
        ("sdpa", ADDED),
        ("sdpa", SHIFTED),
        ("sdpa_nomask_math", PADDED),
        ("sdpa_floatmask", DENSE),
        ("sdpa_floatmask_grad", WORDS),
        ("strided64", DILATED),
        ("strided64", DILATED.but(bias=None)),
        ("ours_d32", DENSE),
        ("blocks64", BAND),
        ("blocks128", BAND),
        ("windows64", BAND),
        ("blocks64", BAND.but(bias=None)),
        ("reshaped", BLOCKS),
        ("reshaped", BLOCKS.but(bias=None)),
        ("reshaped_sdpa", BLOCKS.but(bias=None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["both", "fwd", "bwd"])
def test_peers_compute_the_same(name, problem, direction, dtype):
    errors, wrong = _errors(name, problem.but(dtype=dtype), direction)
    assert not wrong
    mine = page.PEERS[name].problem(problem)
    learned = {n for n in page.draw(mine).leaves if n.startswith(("multiplier", "bias"))}
    gradients = {"query", "key", "value", *learned} if direction != "fwd" else set()
    assert errors.keys() == {"out", *gradients}


@pytest.mark.parametrize("name", ["ours", "eager", "sdpa"])
@pytest.mark.parametrize("problem", [SHIFTED, ADDED.but(B=4)], ids=["shifted", "plain"])
def test_the_page_of_window_attention(name, problem):
    windows = ops.page("window_attention")
    backend = "reference" if name == "ours" else ""
    one = contender.contender(windows, name, problem, "both", backend, windows.draw)
    errors, wrong = check.problems_in(one.result(), windows, problem)
    assert not wrong
    assert errors.keys() == {"out", "query", "key", "value", "bias"}


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("direction", ["fwd", "both"])
def test_the_global_half_alone_is_checked(fault, direction, monkeypatch):
    import lam_kernels

    original = lam_kernels.masked_attention
    found = ops.page("global_local_attention")

    def served(*given, **options):
        return original(*given, **options, backend="reference") * (1.001 if fault else 1.0)

    monkeypatch.setattr(lam_kernels, "masked_attention", served)
    problem = Problem(B=2, H=2, Lq=9, D=4, pattern="Toeplitz(2)", multiplier="b1qk")
    one = contender.contender(found, "ours_global", problem, direction, "reference", found.draw)
    parts = one.peer.expected(problem, "cpu")
    _, wrong = check.problems_in(one.result(), found, problem, parts=parts)
    assert bool(wrong) == fault


def test_w5_is_the_network_of_the_paper():
    problem = CASES["W5"].problem
    assert (problem["depth"], problem["hidden"], problem["key_mask"]) == (32, 32, True)


def test_a_frozen_mask_gets_no_gradient():
    errors, wrong = _errors("ours", DENSE.but(grads="qkv"))
    assert not wrong
    assert errors.keys() == {"out", "query", "key", "value"}


@pytest.mark.parametrize(
    "problem", [DENSE, BAND, BLOCKS, FACTORS], ids=["dense", "band", "blocks", "factors"]
)
def test_slices_of_large_problems_agree_with_the_whole(problem, monkeypatch):
    """Above the limit slices are compared: right results pass, and each output has a part."""
    check.expected.cache_clear()
    monkeypatch.setattr(page, "FULL_PAIRS", 0)
    errors, wrong = _errors("eager", problem.but(seed=1))
    check.expected.cache_clear()
    assert not wrong
    assert errors.keys() == {"out", *page.draw(problem).leaves}


def _row_scaled(t):
    t[0, 0, 3] *= 1.5


def _scaled(t):
    t *= 1.02


def _shifted(t):
    t[:] = t.roll(1, dims=2)


def _one_nan(t):
    t[0, 0, 0, 0] = float("nan")


def _zeroed(t):
    t.zero_()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["out", "query", "key", "value", "multiplier"])
@pytest.mark.parametrize("fault", [_row_scaled, _scaled, _shifted, _one_nan, _zeroed])
@pytest.mark.parametrize("limit", [page.FULL_PAIRS, 0], ids=["whole", "slices"])
def test_planted_faults_are_refused(name, fault, dtype, limit, monkeypatch):
    check.expected.cache_clear()
    monkeypatch.setattr(page, "FULL_PAIRS", limit)
    problem = Problem(B=1, H=1, Lq=12, D=4, multiplier="11qk", dtype=dtype)
    one = contender.contender(page, "eager", problem, "both", "", page.draw)
    result = {n: t.clone() for n, t in one.result().items()}
    fault(result[name])
    _, wrong = check.problems_in(result, page, problem)
    check.expected.cache_clear()
    assert any(name in sentence for sentence in wrong)


def _settings(**changes):
    base = {
        "samples": 1,
        "seconds": 0.01,
        "threads": 1,
        "allocator": "default",
        "backends": ("reference",),
    }
    return measure.Settings(**base | changes)


def test_a_wrong_contender_and_a_failing_one_are_rows_without_a_time(monkeypatch):
    def wrong(operands, backend=""):
        return lambda query, key, value, multiplier, bias: value * 2

    def failing(operands, backend=""):
        raise NotImplementedError("no backward on this device\nand more")

    monkeypatch.setitem(page.PEERS, "wrong", contender.Peer("", wrong))
    monkeypatch.setitem(page.PEERS, "failing", contender.Peer("", failing))
    problem = {"B": 1, "H": 1, "Lq": 8, "D": 4}
    goals = (Goal(9.0, ("wrong", "eager")), Goal(9.0, ("failing",)))
    case = Case("x", "smoke", problem, ("wrong", "failing", "eager"), goals, directions=("fwd",))
    peak = {}
    rows = measure.measure(case, "fp32", "fwd", _settings(), peak)
    by_name = {row["contender"]: row for row in rows}
    assert by_name["wrong"]["error"].startswith("wrong result: out differs")
    assert by_name["failing"]["error"] == "NotImplementedError: no backward on this device and more"
    assert "median_ms" not in by_name["wrong"] | by_name["failing"]
    assert by_name["failing"]["target"] == 9.0
    assert "target_met" not in by_name["failing"]
    assert by_name["eager"]["median_ms"] > 0
    assert "target_met" in by_name["eager"]


def test_a_goal_is_judged_against_the_fastest_of_its_peers():
    rows = [
        {"contender": "ours", "median_ms": 3.0},
        {"contender": "a", "median_ms": 10.0, "ours_over_this": 0.3},
        {"contender": "b", "median_ms": 6.0, "ours_over_this": 0.5},
    ]
    measure._judge(rows, [Goal(0.4, ("a", "b"))], "time")
    assert "target" not in rows[1]
    assert rows[2] | {"target": 0.4, "target_met": False} == rows[2]


def test_graphs_are_judged_against_ours_as_a_graph():
    rows = [
        {"contender": "ours", "median_ms": 3.0},
        {"contender": "a", "median_ms": 10.0, "ours_over_this": 0.3},
        {"contender": "ours+graph", "median_ms": 1.0},
        {"contender": "a+graph", "median_ms": 2.0, "ours_over_this": 0.5},
    ]
    measure._judge(rows, [Goal(0.4, ("a",))], "time")
    assert [row.get("target_met") for row in rows] == [None, True, None, False]


def test_short_gpu_cases_are_held_to_our_other_backend():
    """Every workload of the CUDA kernels, with the gradient of its mask."""
    chosen = {case.name: case for case in select("gpu") if case.name.startswith("gpu-W")}
    assert {name.split("-")[1] for name in chosen} == {"W1", "W5", "W6", "W8", "W12", "W18", "W19"}
    predicted = (ROOT / "docs" / "cuda_kernels.md").read_text()
    for case in chosen.values():
        assert f"\n| {case.name.removeprefix('gpu-')} | 1 | " in predicted
        held = {goal.peers: goal.at_most for goal in case.goals_of("bf16", "both")}
        assert held["ours:triton",] == pytest.approx(1 / 1.3)
        assert held["flex", "sdpa_floatmask_grad"] == pytest.approx(1 / 3)
        problem = measure.problem_of(case, "bf16")
        assert set("qkv") < set(problem.grads)
        settings = _settings(backends=("cuda", "triton"))
        names = measure._contenders(case, page, problem, "both", settings)
        assert names[:2] == ["ours", "ours:triton"]
        assert len(set(names)) == len(names)
        alone = _settings(backends=("triton",))
        assert "ours:triton" not in measure._contenders(case, page, problem, "both", alone)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    case = CASES["smoke-self"]
    try:
        rows = measure.measure(case, "fp32", "both", _settings(threads=2), {})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [row["contender"] for row in rows] == ["ours", "ours_d32", "ours_1thread"]
    assert not any("error" in row for row in rows)


def test_peaks_rise_with_a_better_sample_and_never_fall():
    def series(name, seconds):
        return timing.Series(name, clean={0: seconds})

    flops = 2 * measure.PEAK_SIZE["cpu"] ** 3
    peak = {"peak_dtype": "fp32", "peak_tflops": flops / 0.01 / 1e12, "copy_gbps": 50.0}
    samples = {"ours": series("ours", 1.0), "mm fp32": series("mm fp32", 0.005),
               "copy": series("copy", 1.0)}  # fmt: skip
    raised = measure._raised(peak, samples, "cpu")
    assert raised["peak_tflops"] == pytest.approx(2 * peak["peak_tflops"])
    assert raised["copy_gbps"] == 50.0
    assert list(samples) == ["ours"]


def test_workloads_fit_a_cpu_and_keep_their_windows_together():
    for workload in WORKLOADS.values():
        for part in workload.parts:
            if part.why_not:
                continue
            small = on_cpu(part.problem)
            assert small | {"B": part.problem["B"]} == part.problem
            sample = small["H"] * small["Lq"] * small.get("Lk", small["Lq"])
            assert small["B"] * sample <= CPU_PAIRS or small["B"] == 1
            if "Windows(" in str(small.get("pattern")) and not ops.missing(part.op):
                page.draw(Problem(**small | {"D": 1}))  # refuses part of an image
    assert on_cpu(WORKLOADS["W8"].parts[0].problem)["B"] == 32


def test_the_regression_set_is_of_cases():
    from bench import test_regression

    for name, direction in test_regression._CHOSEN:
        assert direction in CASES[name].directions
