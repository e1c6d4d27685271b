"""The command line: rows in a file, the table from a file, refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import check, memory, ops, record, table
from bench.__main__ import main
from bench.lines import describe
from bench.ops import masked_attention as page
from python_ref.inputs import Problem


def _bench(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        capture_output=True, text=True, cwd=record.ROOT.parent, env=env,
    )  # fmt: skip


def test_a_run_writes_rows_and_the_table_reads_them(tmp_path):
    """Both allocators, each in a process of its own, one file, one run."""
    results = tmp_path / "results.jsonl"
    done = _bench(
        "run", "--case", "smoke-dense", "--case", "smoke-overhead", "--dtype", "fp32",
        "--peer", "eager,plain_function", "--backend", "reference", "--samples", "1",
        "--seconds", "0.01", "--threads", "1", "--allocator", "default,kept",
        "--results", str(results),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = record.read(results)
    assert len({row["run"] for row in rows}) == 1
    assert {row["allocator"] for row in rows} == {"default", "kept"}
    needed = {"machine", "level", "kernel_level", "threads", "torch", "commit", "date", "backend"}
    measured = [row for row in rows if row["measure"] != "peaks"]
    assert all(needed <= row.keys() for row in measured)
    eager = [r for r in measured if r["contender"] == "eager" and r["case"] == "smoke-dense"]
    assert len(eager) == 4  # two directions, two allocators
    for row in eager:
        assert row["samples"] >= 1
        assert row["ours_over_this"] > 0
        assert row["flops"] > 0
        assert set(row["errors"]) >= {"out"}

    shown = _bench("table", "--results", str(results))
    assert shown.returncode == 0, shown.stderr
    assert "smoke-dense: B2 H2 L17 D8" in shown.stdout
    assert rows[0]["machine"] in shown.stdout
    assert rows[0]["date"] in shown.stdout
    assert "| eager |" in shown.stdout


def test_memory_is_measured_in_a_fresh_process():
    problem = repr(Problem(B=2, H=2, Lq=17, D=8, multiplier="b1qk"))
    found = memory.measure_apart(
        "masked_attention", problem, "both", "eager", 1, "reference", "cpu", allocator="kept"
    )
    assert "error" not in found
    assert found["peak_mib"] >= found["kept_mib"] >= 0


def test_memory_sees_what_a_call_takes():
    block = 40 * 2**20
    peak, kept = memory.peak_mib(lambda: bytes(bytearray(os.urandom(1) * block)))
    assert 75 < peak < 90  # the bytearray and its copy
    assert kept < 5


def test_environment_of_the_allocators(monkeypatch):
    for name in record.ALLOCATORS["kept"]:
        monkeypatch.delenv(name, raising=False)
    assert record.allocator_of() == "default"
    assert record.allocator_of(record.environment_for("kept")) == "kept"
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert record.allocator_of() == "custom"
    assert record.allocator_of(record.environment_for("default")) == "default"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--case", "nothing"], "no case matches 'nothing'"),
        (["run", "--dtype", "fp8"], "--dtype 'fp8': expected some of fp32"),
        (["run", "--peer", "flax"], "--peer 'flax'"),
        (["run", "--allocator", "jemalloc"], "--allocator 'jemalloc'"),
        (["run", "--threads", "0"], "numbers from 1 to 9999"),
        (["run", "--op", "softmax"], "--op 'softmax': expected some of masked_attention"),
        (["run", "--workload", "W23"], "expected W1 to W22, B,H,Lq,Lk,D or"),
        (["run", "--workload", "8,12,197,64"], "expected five numbers B,H,Lq,Lk,D"),
        (["run", "--workload", "Problem(L=3)"], "not a problem of masked_attention"),
        (["run", "--workload", "1,1,8,8,4", "--multiplier", "bqk"], "--multiplier 'bqk'"),
        (["run", "--workload", "1,1,8,8,4", "--pattern", "Band(3)"], "expected one of BlockDiag"),
        (["run", "--workload", "1,1,8,8,4", "--pattern", "Toeplitz(-3)"], "radius must be"),
        (["run", "--workload", "1,1,8,8,4", "--pattern", "Toeplitz("], "--pattern 'Toeplitz('"),
        (["run", "--workload", "1,1,8,8,4", "--op", "score_masked_attention", "--bias", "11qk"],
         "--bias: score_masked_attention has no such operand"),
        (["run", "--workload", "W1", "--batch", "half"], "--batch 'half'"),
        (["run", "--samples", "0"], "--samples must be more than 0"),
        (["run", "--seconds", "nan"], "--seconds must be more than 0 and finite"),
        (["run", "--seconds", "inf"], "--seconds must be more than 0 and finite"),
        (["run", "--threads", "99999"], "numbers from 1 to 9999"),
        (["run", "--results", f"{__file__}/x/rows.jsonl"], "Not a directory"),
        (["run", "--graph"], "need --device cuda"),
        (["run", "--case", "smoke-dense", "--device", "cuda"], "sees no CUDA device"),
        (["run", "--case", "smoke-dense", "--backend", "quantum"], "backend 'quantum'"),
        (["run", "--direction", "call", "--backend", "reference"], "no chosen case"),
        (["table", "--results", "nowhere.jsonl"], "nowhere.jsonl"),
        (["table", "--results", "."], "Is a directory: '.'"),
        (["report", "--output", f"{__file__}/page"], "Not a directory"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence_and_code_2(arguments, sentence, monkeypatch, capsys):
    for name in record.ALLOCATORS["kept"]:
        monkeypatch.delenv(name, raising=False)
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    if arguments[0] == "run" and not {"--case", "--workload"} & set(arguments):
        arguments += ["--case", "smoke-dense"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ")
    assert error.count("\n") == 1
    assert sentence in error


@pytest.mark.parametrize("op", [op for op in ops.NAMES if not ops.missing(op)])
def test_given_sizes_are_a_problem_of_every_op(op, capsys):
    asked = f"run --workload 1,2,10,10,8 --op {op} --peer none --dtype fp32 --samples 3 --no-save"
    assert main([*asked.split(), "--allocator", record.allocator_of()]) == 0
    assert "ms (" in capsys.readouterr().out


def test_a_run_of_part_of_a_set_is_no_run_of_the_set(tmp_path, monkeypatch):
    """It would take the set's place in the README's table."""
    for name in record.ALLOCATORS["kept"]:
        monkeypatch.delenv(name, raising=False)
    from bench import measure, run

    monkeypatch.setattr(measure, "measure", lambda *given: [])
    monkeypatch.setattr(run.lines, "describe", lambda rows: "")
    monkeypatch.setattr(measure, "peaks", lambda *given: {"matmul_tflops": 1.0, "peak_tflops": 1.0,
                                                          "copy_gbps": 1.0})  # fmt: skip
    monkeypatch.setattr(run, "_run_apart", lambda args, allocators: 0)
    path = tmp_path / "rows.jsonl"

    def set_of(*arguments):
        path.unlink(missing_ok=True)
        assert main(["run", "--set", "windows", "--results", str(path), *arguments]) == 0
        return record.read(path)[0]["set"]

    mine = ["--allocator", "default", "--run", "r1"]  # as each process of a whole run is called
    assert set_of(*mine) == "windows"
    assert set_of(*mine, "--memory") == "windows"
    for more in (["--samples", "1"], ["--seconds", "0.1"], ["--backend", "reference"],
                 ["--threads", "1"], ["--dtype", "fp32"], ["--batch", "1"],
                 ["--part"]):  # fmt: skip
        assert set_of(*mine, *more) == "part", more
    assert set_of("--allocator", "default") == "part"


def test_a_memory_measurement_that_failed_is_said(monkeypatch, capsys):
    failed = {"error": "exit code -9: no output"}
    monkeypatch.setattr(memory, "measure_apart", lambda *given, **rest: failed)
    asked = "run --workload 1,2,10,10,8 --peer eager --dtype fp32 --samples 3 --no-save --memory"
    assert main([*asked.split(), "--allocator", record.allocator_of()]) == 0
    assert capsys.readouterr().out.count("memory: exit code -9: no output") == 2


def test_a_contender_that_the_op_does_not_have_is_named():
    from bench import contender

    with pytest.raises(ValueError, match="score_masked_attention has no contender 'blocks64'"):
        contender.peer_of(ops.page("score_masked_attention"), "blocks64")


def test_the_table_has_rows_of_what_this_version_does_not_have():
    text = table.render([_row(), _row(contender="ours", case="W3", missing="not in this version")])
    assert "not in this version" in text


def test_a_broken_results_file_is_named_with_its_line(tmp_path, capsys):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(_row()) + '\n{"run": \n')
    assert main(["table", "--results", str(path)]) == 2
    assert "line 2" in capsys.readouterr().err


def _row(**changes):
    row = {
        "run": "r1", "set": "foundation", "date": "2026-01-02", "machine": "A CPU", "cpus": 2,
        "level": "avx2", "kernel_level": "avx2", "torch": "2.13.0", "python": "3.11.7",
        "lam_kernels": "0.1.0", "commit": "abc1234", "threads": 2, "allocator": "default",
        "case": "dense-L50", "section": "dense", "label": "B16 H12 L50 D64", "measure": "time",
        "dtype": "fp32", "direction": "both", "contender": "ours", "median_ms": 2.0, "p20_ms": 1.9,
        "p80_ms": 2.2, "samples": 9, "dropped": 1, "disturbed": False, "delay_measured": True,
        "share_of_matmul": 0.5, "tflops": 0.1, "flops": 200_000_000, "least_bytes": 4_000_000,
    }  # fmt: skip
    return row | changes


PEER = {
    "contender": "compile", "median_ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1, "ours_over_this": 0.5,
    "ours_over_this_p20": 0.48, "ours_over_this_p80": 0.53, "target": 0.7, "target_met": True,
}  # fmt: skip


def test_the_table_says_what_the_rows_say():
    memory_row = {
        k: v for k, v in _row(measure="memory", section="memory", case="memory-L4096").items()
        if k not in ("median_ms", "p20_ms", "p80_ms", "samples", "dropped", "disturbed")
    }  # fmt: skip
    rows = [
        _row(),
        _row(**PEER),
        _row(**PEER | {"contender": "sdpa_nomask", "disturbed": True})
        | {"target": 0.4, "target_met": False},
        _row(contender="eager", error="RuntimeError: a | b"),
        memory_row | {"peak_mib": 99.6, "kept_mib": 3.2, "target": 120.0, "target_met": True},
        _row(
            measure="overhead", section="overhead", case="overhead-tiny", direction="call",
            contender="plain_function", ours_minus_this_us=12.34, target=20.0, target_met=True,
        ),
    ]  # fmt: skip
    text = table.render(rows)
    assert "Measured 2026-01-02 on A CPU (2 CPUs, avx2, kernels at avx2), 2 threads" in text
    assert "| compile | 4 (3.9 .. 4.1) | 50% | 0.50 (0.48 .. 0.53) | 0.7 | yes |" in text
    assert "| sdpa_nomask | ~4 (3.9 .. 4.1) | 50% | 0.50 (0.48 .. 0.53) | 0.4 | **no** |" in text
    assert "RuntimeError: a \\| b" in text
    assert "| ours | 100 | 3 | 120 | yes |" in text
    assert "| 12.3 | 20 | yes |" in text
    assert (
        "Targets reached: 3 of 4. Not reached: dense-L50 fp32 both default against sdpa_nomask."
        in text
    )
    assert "dropped because other work kept our threads waiting: " in text
    for line in text.splitlines():  # every table line has its section's number of cells
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (9, 10)


def test_the_table_takes_the_last_whole_run_of_a_file():
    rows = [_row(run="whole"), _row(run="whole2"), _row(run="tuning", set="part")]
    assert table.choose_run(rows)[0]["run"] == "whole2"
    assert table.choose_run(rows, "tuning")[0]["run"] == "tuning"
    assert table.choose_run(rows[2:])[0]["run"] == "tuning"
    with pytest.raises(ValueError, match="no run 'x'"):
        table.choose_run(rows, "x")


def test_lines_of_a_case():
    text = describe([_row(), _row(**PEER), _row(contender="flex", error="NotImplementedError: no")])
    assert "ours/this 0.50 (0.48 .. 0.53)  target 0.7 reached" in text
    assert "9 samples, 1 dropped" in text
    assert "NotImplementedError: no" in text


def test_rows_are_plain_json(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    record.append(path, [_row()])
    record.append(path, [_row()])
    assert record.read(path) == [_row(), _row()]
    with pytest.raises(ValueError, match="JSON"):
        record.append(path, [_row(median_ms=float("nan"))])
    assert json.loads(path.read_text().splitlines()[0])["case"] == "dense-L50"


def test_the_file_name_says_processor_and_date_only():
    name = record.default_path().name
    assert name.endswith(".jsonl")
    assert os.uname().nodename.split(".")[0] not in name.split("-") or len(os.uname().nodename) < 4


def test_processes_of_a_run_share_references(monkeypatch):
    """The second one reads what the first computed, and the folder is gone afterwards."""
    monkeypatch.delenv(record.REFERENCES, raising=False)
    problem = Problem(B=1, H=1, Lq=5, D=2, multiplier="11qk")
    with record.shared_references():
        folder = os.environ[record.REFERENCES]
        check.expected.cache_clear()
        first = check.expected(page, problem)
        check.expected.cache_clear()
        monkeypatch.setattr(page, "expected", None)
        second = check.expected(page, problem)
        assert record.environment_for("kept")[record.REFERENCES] == folder
        with record.shared_references():
            assert os.environ[record.REFERENCES] == folder
    check.expected.cache_clear()
    assert not os.path.exists(folder)
    assert record.REFERENCES not in os.environ
    for a, b in zip(first, second, strict=True):
        assert (a.name, a.index) == (b.name, b.index)
        assert a.values.equal(b.values)


def test_table_goes_between_the_markers_and_nowhere_else():
    document = "a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nz\n"
    once = table.insert(document, "| new |\n")
    assert once == "a\n<!-- bench:begin -->\n| new |\n<!-- bench:end -->\nz\n"
    assert table.insert(once, "| new |") == once
    with pytest.raises(ValueError, match="bench:begin"):
        table.insert("no markers", "| new |")


def test_brief_table_has_one_line_a_held_comparison():
    origin = dict.fromkeys(
        ("date", "machine", "level", "kernel_level", "torch", "python", "lam_kernels", "commit"),
        "x",
    ) | {
        "run": "r", "cpus": 2, "threads": 2, "set": "foundation", "section": "dense",
        "case": "dense-L50", "label": "shape", "measure": "time", "dtype": "fp32",
        "direction": "both", "disturbed": False, "samples": 3, "dropped": 0,
        "median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1,
    }  # fmt: skip
    rows = []
    for allocator, ratio in (("default", 0.5), ("kept", 0.9)):
        rows.append(origin | {"allocator": allocator, "contender": "ours"})
        rows.append(
            origin
            | {"allocator": allocator, "contender": "compile", "ours_over_this": ratio}
            | {"target": 0.7, "target_met": ratio <= 0.7}
        )
    wrong = {"contender": "compile", "error": "wrong result", "target": 0.7}
    rows += [
        {k: v for k, v in origin.items() if k != "median_ms"}
        | {"case": "dense-L197", "allocator": "default"}
        | row
        for row in ({"contender": "ours", "error": "killed"}, wrong)
    ]
    text = table.render_brief(rows)
    assert "| dense-L197, forward + backward | fp32 | compile |  | not measured |  | 0.7 |" in text
    line = "| dense-L50, forward + backward | fp32 | compile | 2 | 0.50 | **no** 0.90 | 0.7 |"
    assert text.count("dense-L50, forward") == 1
    assert line in text
