"""Two runs -> what of ours got faster or slower, with the noise taken into account.

For each measurement that both runs have, with medians a and b:

    moved    r = ln(b / a)
    drift    median of r over the contenders that are not ours: their code is the same in both, so
             how they moved is how the machine moved. r - drift is what our change did
    noise    z sqrt(se_a^2 + se_b^2 + s^2 + e^2): se is the standard error of a median, from the 20
             and 80 percentiles of its samples; s is how differently the unchanged contenders moved
             (1.48 times their median distance from the drift), e the standard error of the drift
             itself, which counts where there are few of them; z is 2 for one measurement and grows
             with their number (3.2 for 40): a false alarm is as rare in a run of many

A measurement is slower when r - drift is above the noise AND above the threshold, faster the same
way downwards, unclear when it is above the threshold but within the noise.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median

from . import record
from .timing import LEAST_CLEAN

THRESHOLD = 0.10
SPREAD_IN_SIGMAS = 1.683  # from the 20th to the 80th percentile of a normal distribution
MEDIAN_ERROR = 1.2533  # standard error of a median / of a mean, for a normal distribution
LEAST_MIB = 1.0  # a smaller change of a peak is one of the allocator's pages

EPILOG = """\
examples
  python -m bench compare 20261121T070636Z 20261121T091500Z
      two runs of bench/results by their ids (each run prints its own)
  python -m bench compare before.jsonl after.jsonl --threshold 0.05
      two files, the last whole run of each; FILE@RUN names a run of a file
  python -m bench compare --against HEAD~1 --case dense-L197 --case toeplitz64-bias
      this tree against a commit: the commit is checked out and built beside it (its libraries are
      taken over when csrc/ is the same), both are measured in turns with THIS tree's bench, and the
      two are compared; all options of `run` choose what is measured
  python -m bench compare --against main --set foundation --quick

how to read a line
  slower  +23% (noise 6%)  dense-L197 fp32 both  14.1 -> 17.6 ms
      after the machine's own drift is taken out; the drift and where it is from stand below
  unclear
      more than the threshold, but within the noise: measure again with --full, or on a calm machine

The exit code is 1 when something of ours is slower beyond threshold and noise, needs more memory,
or fails where it had a time; 2 for runs that cannot be compared.
"""


@dataclass
class Change:
    """What became of one measurement of ours."""

    verdict: str  # slower, faster, same, unclear, failed, too few samples
    what: str
    change: float = 0.0  # b / a - 1, drift taken out
    noise: float = 0.0
    values: str = ""

    def __str__(self) -> str:
        if self.verdict in ("failed", "too few samples"):
            return f"{self.verdict:<8}{self.what}  {self.values}"
        text = f"{self.verdict:<8}{self.change:+.0%} (noise {self.noise:.0%})"
        return f"{text:<28}{self.what}  {self.values}"


@dataclass
class Comparison:
    changes: list[Change]
    drift: float  # of unchanged contenders, b / a - 1
    drift_spread: float
    controls: int
    notes: list[str]

    @property
    def regressed(self) -> bool:
        return any(change.verdict in ("slower", "failed") for change in self.changes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="A B", help="run ids, files, or FILE@RUN")
    parser.add_argument("--against", metavar="REV", help="a commit, instead of A and B")
    parser.add_argument("--threshold", type=float, default=THRESHOLD,
                        help="a smaller change is never a regression (default: 0.10)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="--against: turns of each (2)")
    parser.add_argument("--all", action="store_true", help="also what stayed the same")


def compare(args: argparse.Namespace) -> int:
    if args.threshold <= 0 or args.rounds < 1:
        raise ValueError("--threshold must be above 0 and --rounds at least 1")
    if args.against:
        if args.runs:
            raise ValueError("compare takes two runs, or --against REV, not both")
        from . import against

        before, after = against.measure_both(args)
    else:
        if len(args.runs) != 2:
            raise ValueError(f"compare takes two runs, got {len(args.runs)}")
        before, after = (load(text) for text in args.runs)
    found = compared(before, after, args.threshold)
    print(describe(found, before[0], after[0], args.threshold, args.all))
    return 1 if found.regressed else 0


def load(text: str) -> list[dict]:
    """The rows of a run id, a file's last whole run, or FILE@RUN."""
    from .table import choose_run

    file, _, run_id = text.partition("@")
    if Path(file).is_file():
        return choose_run(record.read(Path(file)), run_id or None)
    if run_id or "/" in text or text.endswith(".jsonl"):
        raise FileNotFoundError(f"no results file {file}")
    for path in sorted(record.RESULTS.glob("*.jsonl")):
        rows = [row for row in record.read(path) if row["run"] == text]
        if rows:
            return rows
    raise ValueError(f"no run {text!r} in {record.RESULTS.name}/, and no file of that name")


_KEY = (
    "case", "problem", "measure", "dtype", "direction", "device", "threads", "allocator",
    "contender",
)  # fmt: skip


def _by_key(rows: list[dict]) -> dict[tuple, dict]:
    """By what was measured; one kernel of ours is no change of another one's time."""
    return {
        (row.get("backend") if row["contender"].startswith("ours") else "",
         *(row.get(name) for name in _KEY)): row
        for row in rows
        if row["measure"] != "peaks"
    }  # fmt: skip


def compared(before: list[dict], after: list[dict], threshold: float = THRESHOLD) -> Comparison:
    """ValueError when the runs are of different machines or have nothing in common."""
    for name in ("machine", "cpus", "gpu"):
        a, b = (rows[0].get(name) for rows in (before, after))
        if a != b:
            what = f" ({name})" if name == "cpus" else ""
            raise ValueError(f"the runs are of different machines: {a} and {b}{what}")
    a, b = _by_key(before), _by_key(after)
    common = [key for key in a if key in b]
    if not common:
        raise ValueError("the runs have no measurement in common")
    notes = [
        f"{name} differs: {x} and {y}"
        for name in ("torch", "python", "kernel_level")
        if (x := before[0].get(name)) != (y := after[0].get(name))
    ]
    controls = [key for key in common if not _is_ours(key) and _timed(a, b, key)]
    if notes:
        controls = []  # then the peers are not the same code
    moved = [_moved(a[key], b[key]) for key in controls]
    drift = median(moved) if moved else 0.0
    spread = 1.4826 * median(abs(r - drift) for r in moved) if moved else 0.0
    errors = [math.hypot(_standard_error(a[key]), _standard_error(b[key])) for key in controls]
    unsure = math.hypot(spread, math.hypot(*errors) / max(1, len(errors)))
    ours = [key for key in common if _is_ours(key)]
    sigmas = _sigmas(sum(_timed(a, b, key) for key in ours))
    changes = [_judged(a[key], b[key], drift, unsure, sigmas, threshold) for key in ours]
    changes += [  # of a time's row, which --memory and CUDA give a peak as well
        _memory_change(a[key], b[key], threshold)
        for key in ours
        if all({"median_ms", "peak_mib"} <= rows[key].keys() for rows in (a, b))
    ]
    order = ("failed", "slower", "unclear", "faster", "same", "too few samples")
    found = [change for change in changes if change]
    found.sort(key=lambda change: (order.index(change.verdict), -abs(change.change)))
    missing = sum(1 for key in a if key not in b and _is_ours(key))
    if missing:
        notes.append(f"{missing} measurements of ours are in the first run only")
    return Comparison(found, math.expm1(drift), math.expm1(spread), len(moved), notes)


def _is_ours(key: tuple) -> bool:
    return key[-1].startswith("ours")


def _timed(a: dict, b: dict, key: tuple) -> bool:
    return all("median_ms" in rows[key] and _certain(rows[key]) for rows in (a, b))


def _certain(row: dict) -> bool:
    return row.get("samples", 0) >= LEAST_CLEAN


def _moved(a: dict, b: dict) -> float:
    return math.log(b["median_ms"] / a["median_ms"])


def _standard_error(row: dict) -> float:
    sigma = (row["p80_ms"] - row["p20_ms"]) / SPREAD_IN_SIGMAS / row["median_ms"]
    return MEDIAN_ERROR * sigma / math.sqrt(row["samples"])


def _what(row: dict) -> str:
    text = f"{row['case']} {row['dtype']} {row['direction']}"
    for name, usual in (("allocator", "default"), ("contender", "ours")):
        text += f" {row[name]}" if row.get(name) != usual else ""
    return f"{text} {row['threads']} threads"


def _sigmas(measurements: int) -> float:
    """Of as many measurements one is beyond this by chance as rarely as one alone is beyond 2."""
    normal = NormalDist()
    return normal.inv_cdf(1 - (1 - normal.cdf(2)) / max(1, measurements))


def _judged(
    a: dict, b: dict, drift: float, unsure: float, sigmas: float, threshold: float
) -> Change | None:
    what = _what(b)
    had, has = (("median_ms" in row or "peak_mib" in row) for row in (a, b))
    if had and not has:
        why = b.get("error") or b.get("missing") or "nothing was measured"
        return Change("failed", what, math.inf, values=f"had a result, now: {why}")
    if not (had and has):
        return None
    if "median_ms" not in a or "median_ms" not in b:
        return _memory_change(a, b, threshold)
    values = f"{a['median_ms']:.4g} -> {b['median_ms']:.4g} ms"
    if not (_certain(a) and _certain(b)):
        return Change("too few samples", what, values=values)
    moved = _moved(a, b) - drift
    noise = sigmas * math.sqrt(_standard_error(a) ** 2 + _standard_error(b) ** 2 + unsure**2)
    verdict = _verdict(moved, noise, threshold)
    return Change(verdict, what, math.expm1(moved), math.expm1(noise), values)


def _verdict(moved: float, noise: float, threshold: float) -> str:
    if abs(moved) <= math.log1p(threshold):
        return "same"
    if abs(moved) <= noise:
        return "unclear"
    return "slower" if moved > 0 else "faster"


def _memory_change(a: dict, b: dict, threshold: float) -> Change:
    before, after = a["peak_mib"], b["peak_mib"]
    change = after / before - 1 if before > 0 else 0.0
    verdict = "same"
    if abs(after - before) > LEAST_MIB and abs(change) > threshold:
        verdict = "slower" if change > 0 else "faster"
    values = f"{before:.1f} -> {after:.1f} MiB of peak memory"
    return Change(verdict, _what(b), change, 0.0, values)


def describe(
    found: Comparison, before: dict, after: dict, threshold: float, everything: bool = False
) -> str:
    lines = [
        f"A  commit {before['commit']}, run {before['run']}, {before['date']}",
        f"B  commit {after['commit']}, run {after['run']}, {after['date']}",
        "",
    ]
    shown = [c for c in found.changes if everything or c.verdict not in ("same", "too few samples")]
    lines += [str(change) for change in shown]
    counts = {v: sum(c.verdict == v for c in found.changes) for v in _VERDICTS}
    lines.append(", ".join(f"{n} {v}" for v, n in counts.items() if n) + f" ({threshold:.0%})")
    if found.controls:
        lines.append(
            f"drift of {found.controls} measurements of code that did not change: "
            f"{found.drift:+.1%}, apart by {found.drift_spread:.1%}; taken out and counted as noise"
        )
    else:
        lines.append("no unchanged contender to see the machine's own drift by: none taken out")
    return "\n".join(lines + [f"note: {note}" for note in found.notes])


_VERDICTS = ("failed", "slower", "unclear", "faster", "same", "too few samples")
