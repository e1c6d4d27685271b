"""What got slower: on made-up rows, and on a contender that was slowed down on purpose."""

import json
import random
import subprocess
import time

import pytest
from rows import row, timed

from bench import against, compare, measure, record
from bench.__main__ import main
from bench.cases import Case
from bench.contender import Peer
from bench.ops import masked_attention as page
from bench.timing import spread


def _run(ours, peers, **common):
    """Rows of one case for each of `ours`, with peers that did not change."""
    rows = []
    for i, value in enumerate(ours):
        case = {"case": f"c{i}", "problem": f"Problem(Lq={i})"} | common
        rows.append(timed(value, **case))
        rows += [timed(peer * (i + 1), contender=name, **case) for name, peer in peers.items()]
    return rows


PEERS = {"eager": 4.0, "compile": 3.0}


def _verdicts(a, b, threshold=0.1):
    found = compare.compared(a, b, threshold)
    return [change.verdict for change in found.changes], found


def test_the_same_run_has_no_change():
    rows = _run([2.0, 5.0], PEERS)
    verdicts, found = _verdicts(rows, rows)
    assert verdicts == ["same", "same"]
    assert found.drift == 0
    assert not found.regressed


def test_a_planted_slow_down_is_found_and_a_gain_is_none():
    verdicts, found = _verdicts(_run([2.0, 5.0, 3.0], PEERS), _run([2.6, 5.1, 2.0], PEERS))
    assert verdicts == ["slower", "faster", "same"]
    assert found.regressed
    assert found.changes[0].change == pytest.approx(0.3)
    assert "c0 fp32 both" in found.changes[0].what


def test_the_machines_own_drift_is_taken_out():
    """Everything 30 % slower is a slower machine; ours alone at the old time is then a gain."""
    slow = {name: 1.3 * value for name, value in PEERS.items()}
    verdicts, found = _verdicts(_run([2.0, 5.0], PEERS), _run([2.6, 5.0], slow))
    assert sorted(verdicts) == ["faster", "same"]
    assert found.drift == pytest.approx(0.3)
    verdicts, _ = _verdicts(_run([2.0], PEERS), _run([2.0 * 1.3 * 1.25], slow))
    assert verdicts == ["slower"]


def test_a_change_within_the_noise_is_unclear():
    """Wide samples, or unchanged contenders that moved every which way."""
    noisy = {"p20_ms": 1.2, "p80_ms": 4.0}
    a, b = [timed(2.0, **noisy)], [timed(2.6, **noisy)]
    assert _verdicts(a, b)[0] == ["unclear"]
    before, after = _run([2.0, 5.0], PEERS), _run([2.6, 5.0], {"eager": 2.0, "compile": 6.0})
    verdicts, found = _verdicts(before, after)
    assert "slower" not in verdicts
    assert found.drift_spread > 0.3


def test_a_noisy_contender_makes_an_unsure_drift():
    """One unchanged contender says little about the machine when its own samples are wide."""
    wide = {"contender": "eager", "p20_ms": 3.0, "p80_ms": 5.0}
    a, b = ([timed(2.0), timed(ms) | wide] for ms in (4.6, 4.0))
    assert _verdicts(a, b)[0] == ["unclear"]
    narrow = {"contender": "eager"}
    a, b = ([timed(2.0), timed(ms, **narrow)] for ms in (4.6, 4.0))
    assert _verdicts(a, b)[0] == ["slower"]


def test_many_measurements_of_one_build_raise_no_alarm():
    """Forty measurements of samples that vary by 8 %: with 2 sigmas for each every fourth
    comparison of a build with itself would find something slower."""
    draw = random.Random(0)

    def measured(ms=2.0):
        samples = [ms * draw.lognormvariate(0, 0.08) for _ in range(7)]
        low, middle, high = spread(samples)
        return {"median_ms": middle, "p20_ms": low, "p80_ms": high, "samples": 7}

    def run(**slower):
        names = [(f"c{i}", name) for i in range(40) for name in ("ours", "eager", "compile")]
        return [
            row(case=case, problem=case, contender=name,
                **measured(slower.get(case, 2.0) if name == "ours" else 4.0))
            for case, name in names
        ]  # fmt: skip

    alarms = sum(compare.compared(run(), run()).regressed for _ in range(40))
    assert alarms <= 4
    found = [compare.compared(run(), run(c7=3.0)).changes[0] for _ in range(10)]
    assert sum(change.verdict == "slower" and "c7 " in change.what for change in found) >= 9


def test_another_kernel_of_ours_is_no_change():
    a, b = (timed(ms, backend=name) for ms, name in ((2.0, "cpu"), (9.0, "reference")))
    with pytest.raises(ValueError, match="no measurement in common"):
        compare.compared([a], [b])
    again = timed(9.0, backend="reference", case="other")
    _, found = _verdicts([a, again], [b, again])
    assert any("1 measurements of ours are in the first run only" in note for note in found.notes)


def test_few_samples_decide_nothing():
    assert _verdicts([timed(2.0, samples=2)], [timed(9.0, samples=2)])[0] == ["too few samples"]


def test_below_the_threshold_is_the_same():
    a, b = _run([2.0], PEERS), _run([2.3], PEERS)
    assert _verdicts(a, b, 0.2)[0] == ["same"]
    assert _verdicts(a, b, 0.1)[0] == ["slower"]


def test_a_result_that_is_gone_is_a_failure():
    gone = row(median_ms=None, error="wrong result: out differs")
    verdicts, found = _verdicts([timed(2.0)], [gone])
    assert verdicts == ["failed"]
    assert found.regressed
    assert "wrong result" in str(found.changes[0])
    assert _verdicts([gone], [timed(2.0)])[0] == []  # what begins to work is no regression


def test_memory_is_compared_without_noise():
    def peak(mib):
        return row(measure="memory", median_ms=None, peak_mib=mib)

    assert _verdicts([peak(100.0)], [peak(130.0)])[0] == ["slower"]
    assert _verdicts([peak(100.0)], [peak(60.0)])[0] == ["faster"]
    assert _verdicts([peak(0.2)], [peak(0.9)])[0] == ["same"]  # a page of the allocator
    both = [timed(2.0, peak_mib=mib) for mib in (100.0, 130.0)]
    verdicts, found = _verdicts(both[:1], both[1:])
    assert verdicts == ["slower", "same"]
    assert found.regressed


def test_other_versions_give_no_drift():
    """A newer torch changes the peers: they are no measure of the machine any more."""
    a, b = _run([2.0], PEERS), _run([2.0], {"eager": 1.0, "compile": 1.0}, torch="2.14.0")
    verdicts, found = _verdicts(a, b)
    assert (verdicts, found.controls) == (["same"], 0)
    assert any("torch differs" in note for note in found.notes)


def test_other_machines_and_other_cases_are_refused():
    with pytest.raises(ValueError, match="different machines: A CPU and B CPU"):
        compare.compared([timed(1.0)], [timed(1.0, machine="B CPU")])
    with pytest.raises(ValueError, match=r"different machines: 2 and 16 \(cpus\)"):
        compare.compared([timed(1.0)], [timed(1.0, cpus=16)])
    with pytest.raises(ValueError, match="no measurement in common"):
        compare.compared([timed(1.0)], [timed(1.0, case="other")])
    with pytest.raises(ValueError, match="no measurement in common"):
        compare.compared([timed(1.0)], [timed(1.0, threads=1)])


def test_the_command_and_its_exit_code(tmp_path, capsys):
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    record.append(before, _run([2.0, 5.0], PEERS, run="a"))
    record.append(after, _run([2.6, 5.0], PEERS, run="b"))
    assert main(["compare", str(before), str(before)]) == 0
    assert main(["compare", str(before), str(after)]) == 1
    printed = capsys.readouterr().out
    assert "slower  +30%" in printed
    assert "1 slower, 1 same (10%)" in printed
    assert main(["compare", str(before), f"{after}@b", "--threshold", "0.5"]) == 0
    for arguments, sentence in (
        (["compare", str(before)], "takes two runs, got 1"),
        (["compare", str(before), f"{after}@c"], "no run 'c'"),
        (["compare", str(before), "20000101T000000Z"], "no run '20000101T000000Z'"),
        (["compare", str(before), "missing.jsonl"], "no results file"),
        (["compare", "--against", "HEAD", "a", "b"], "not both"),
        (["compare", "a", "b", "--threshold", "0"], "must be above 0"),
    ):
        assert main(arguments) == 2
        assert sentence in capsys.readouterr().err


def _measured(path, run_id, delay, monkeypatch):
    """A real measurement of a tiny case in which ours sleeps that long in each call."""
    build = page.PEERS["eager"].build

    def slow(operands, backend=""):
        call = build(operands, backend)

        def sleeping(*given):
            time.sleep(delay)
            return call(*given)

        return sleeping

    monkeypatch.setitem(page.PEERS, "ours", Peer("eager that sleeps", slow))
    case = Case("planted", "smoke", {"B": 1, "H": 1, "Lq": 16, "D": 4}, ("eager",))
    settings = measure.Settings(
        samples=5, seconds=5.0, threads=1, allocator="default", backends=("reference",)
    )
    peak = {}
    names = ("date", "machine", "torch", "commit", "python", "kernel_level", "level", "lam_kernels")
    facts = dict.fromkeys(names, "x") | {"run": run_id, "cpus": 2}
    rows = measure.measure(case, "fp32", "fwd", settings, peak)
    assert not [r for r in rows if "error" in r]
    record.append(path, [facts | r for r in rows])


def test_a_contender_slowed_down_on_purpose_is_found(tmp_path, monkeypatch, capsys):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _measured(before, "a", 0.002, monkeypatch)
    _measured(after, "b", 0.020, monkeypatch)
    assert main(["compare", str(before), str(after)]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["compare", str(after), str(before)]) == 0
    assert "faster" in capsys.readouterr().out


def test_rounds_are_pooled_with_the_widest_spread():
    rounds = [[timed(2.0), row(contender="x", median_ms=None, error="no")], [timed(3.0)]]
    pooled = {r["contender"]: r for r in against.pooled(rounds)}
    assert pooled["ours"]["median_ms"] == 2.5
    assert (pooled["ours"]["p20_ms"], pooled["ours"]["p80_ms"]) == (0.99 * 2.0, 1.01 * 3.0)
    assert pooled["ours"]["samples"] == 18
    rounds = [[timed(2.0, peak_mib=mib)] for mib in (10.0, 30.0)]
    assert against.pooled(rounds)[0]["peak_mib"] == 20.0
    assert pooled["x"]["error"] == "no"


def test_against_takes_the_options_of_run_only():
    given = ["compare", "--against", "HEAD~1", "--case", "x", "--threshold=0.2", "--rounds", "3",
             "--all", "--no-save", "--quick"]  # fmt: skip
    assert against._run_options(given) == ["--case", "x", "--quick"]


def test_against_this_commit(capfd):
    """Both trees are measured by this bench, each with its own lam_kernels."""
    git = ["git", "-C", str(record.ROOT), "rev-parse", "--verify", "HEAD"]
    if subprocess.run(git, capture_output=True).returncode:
        pytest.skip("no git checkout: there is no commit to compare with")
    code = main([
        "compare", "--against", "HEAD", "--case", "smoke-overhead", "--direction", "call",
        "--peer", "none", "--samples", "3", "--seconds", "0.1", "--threads", "1", "--rounds", "1",
        "--backend", "reference", "--threshold", "100",
    ])  # fmt: skip
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert printed.count("lam_kernels 0.") == 2
    assert "A  commit " in printed
    assert "no unchanged contender" in printed
    listed = subprocess.run(
        ["git", "-C", str(record.ROOT), "worktree", "list"], capture_output=True, text=True
    )
    assert "checkout" not in listed.stdout


def test_json_rows_survive_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = _run([2.0], PEERS)
    record.append(path, rows)
    assert compare.load(str(path)) == json.loads(json.dumps(rows))
