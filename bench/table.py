"""Rows -> the README's table, in markdown. Nothing is in it that is not in the rows."""

from __future__ import annotations

from collections.abc import Iterable

from .cases import SECTIONS
from .record import uncertain

_DIRECTIONS = {
    "fwd": "forward",
    "bwd": "backward",
    "both": "forward + backward",
    "call": "forward, gradients on",
}


def choose_run(rows: list[dict], run_id: str | None = None) -> list[dict]:
    """The rows of the named run; else of the last run of a whole set; else of the last run."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    if run_id is None:
        whole = {row["run"] for row in rows if row.get("set") not in ("part", "smoke")}
        run_id = next((r for r in reversed(runs) if r in whole), runs[-1] if runs else None)
    chosen = _latest(row for row in rows if row["run"] == run_id)
    if not chosen:
        raise ValueError(f"no run {run_id!r} here; there are {', '.join(runs) or 'none'}")
    return chosen


_SAME = ("case", "problem", "measure", "dtype", "direction", "device", "threads", "allocator",
         "contender", "backend")  # fmt: skip


def _latest(rows: Iterable[dict]) -> list[dict]:
    """Without what was measured again in the same run, as a stage of gpu-check may be."""
    return list({tuple(row.get(name) for name in _SAME): row for row in rows}.values())


def last_runs(rows: list[dict]) -> list[list[dict]]:
    """The last run of each set, whole sets first; only partial ones where there is no other."""
    last: dict[str, str] = {}
    for row in rows:
        last[row.get("set", "part")] = row["run"]
    if not last:
        raise ValueError("there is no measurement in this file")
    chosen = {name: run for name, run in last.items() if name not in ("part", "smoke")} or last
    order = {"overview": 0, "workloads": 1, "lengths": 2, "foundation": 3}
    names = sorted(chosen, key=lambda name: order.get(name, 9))
    return [_latest(row for row in rows if row["run"] == chosen[name]) for name in names]


def with_run_peaks(rows: list[dict]) -> list[dict]:
    """The rows, shares being of the best torch.mm and copy of the whole run: a case may have had
    one sample of them, and other load in it."""
    best: dict[tuple, float] = {}
    for row in rows:
        for name in ("peak_tflops", "peak_gbps"):
            if name in row:
                key = (name, *_peak_of(row))
                best[key] = max(best.get(key, 0.0), row[name])
    found = []
    for row in rows:
        more = {}
        for name, rate, share in (
            ("peak_tflops", "tflops", "share_of_matmul"), ("peak_gbps", "gbps", "share_of_copy"),
        ):  # fmt: skip
            if name in row and rate in row:
                peak = best[name, *_peak_of(row)]
                more |= {name: peak, share: round(row[rate] / peak, 4)}
        found.append(row | more)
    return found


def _peak_of(row: dict) -> tuple:
    return row.get("device", "cpu"), row["dtype"], row["threads"], row["allocator"]


_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"


def insert(document: str, text: str) -> str:
    """The document with the text between its two markers, each a line of its own."""
    before, begin, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"there is no {_BEGIN} ... {_END} to write the table to")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def render(rows: list[dict], run_id: str | None = None) -> str:
    """One table a section, the machine and the date above them, what was missed below."""
    rows = with_run_peaks(choose_run(rows, run_id))
    parts = [_origin(rows)]
    for section, title in SECTIONS.items():
        mine = [row for row in rows if row.get("section") == section]
        if mine:
            parts += [f"**{title}**", _section(mine)]
    parts.append(_summary(rows))
    return "\n\n".join(parts) + "\n"


def render_short(rows: list[dict]) -> str:
    """The README's table: a line a case, ours beside what one would use otherwise."""
    rows = with_run_peaks(rows)
    parts = [_origin(rows)]
    for section, title in SECTIONS.items():
        mine = [row for row in rows if row.get("section") == section]
        groups: _Groups = {}
        for row in mine:
            key = (row["case"], row["dtype"], row["direction"], row["threads"])
            contenders = groups.setdefault(key, {})
            contenders.setdefault(row["contender"], {})[row["allocator"]] = row
        if groups:
            memory = any(row["measure"] == "memory" for row in mine)
            parts += [f"**{title}**", (_short_memory if memory else _short_times)(groups)]
    dropped, taken = (sum(row.get(name, 0) for row in rows) for name in ("dropped", "samples"))
    parts.append(
        f"Samples used: {taken}; dropped because other work kept our threads waiting: {dropped}."
    )
    return "\n\n".join(parts) + "\n"


_Groups = dict[
    tuple, dict[str, dict[str, dict]]
]  # case .. threads -> contender -> allocator -> row


def _names(groups: _Groups) -> list[str]:
    return list(dict.fromkeys(n for group in groups.values() for n in group if n != "ours"))


def _lines(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)


def _described(key: tuple, groups: _Groups) -> str:
    """Case, problem and direction; threads where a run has several."""
    case, _, direction, threads = key
    by_allocator = next(iter(groups[key].values()))
    text = f"{case}: {next(iter(by_allocator.values()))['label']}, {_DIRECTIONS[direction]}"
    return text + (f", {threads} threads" if len({other[3] for other in groups}) > 1 else "")


def _each(by_allocator: dict[str, dict] | None, cell) -> str:
    """What `cell` says of the row of each allocator, the default one above."""
    rows = [(by_allocator or {}).get(name) for name in ("default", "kept")]
    return "<br>".join(cell(row) for row in rows if row is not None)


def _short_times(groups: _Groups) -> str:
    """Ours in ms, its share of torch.mm, and ours / each contender."""

    def time(row: dict) -> str:
        if "median_ms" not in row:
            return row.get("missing") or row.get("error", "")
        return ("~" if uncertain(row) else "") + f"{row['median_ms']:.3g}"

    def share(row: dict) -> str:
        return f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else ""

    def ratio(row: dict) -> str:
        return "fails" if "error" in row else _ratio(row)

    names = _names(groups)
    body = []
    for key, group in groups.items():
        mine = group.get("ours")
        cells = [_described(key, groups), key[1], _each(mine, time), _each(mine, share)]
        body.append([*cells, *(_each(group.get(name), ratio) for name in names)])
    return _lines(["case", "dtype", "ours, ms", "of torch.mm", *(f"/ {n}" for n in names)], body)


def _short_memory(groups: _Groups) -> str:
    """Peak MiB of every contender."""

    def peak(row: dict) -> str:
        return f"{row['peak_mib']:.0f}" if "peak_mib" in row else "fails"

    names = ["ours", *_names(groups)]
    body = [
        [_described(key, groups), key[1], *(_each(group.get(name), peak) for name in names)]
        for key, group in groups.items()
    ]
    return _lines(["peak MiB", "dtype", *names], body)


def render_brief(rows: list[dict], run_id: str | None = None) -> str:
    """The targets of the named run; else those of the last run of each whole set."""
    if run_id is not None:
        return _targets(choose_run(rows, run_id))
    held = [run for run in last_runs(rows) if any("target" in row for row in run)]
    if not held:
        raise ValueError("no run here has targets: python -m bench run --set foundation")
    return "\n".join(f"## {run[0].get('set', 'part')}\n\n{_targets(run)}" for run in held)


def _targets(rows: list[dict]) -> str:
    """One line a held comparison: the ratio under both allocator settings beside its target."""
    parts = [_origin(rows, shares=False)]
    for section, title in SECTIONS.items():
        held = [
            row for row in rows
            if row.get("section") == section and row["measure"] == "time" and "target" in row
        ]  # fmt: skip
        if not held:
            continue
        ours = {
            (row["case"], row["dtype"], row["direction"], row["allocator"]): row
            for row in rows
            if row["contender"] == "ours" and row["measure"] == "time"
        }
        cells: dict[tuple, dict[str, dict]] = {}
        for row in held:
            key = (row["case"], row["dtype"], row["direction"], row["contender"])
            cells.setdefault(key, {})[row["allocator"]] = row
        lines = [
            "| case | dtype | contender | ours, ms | ours / this, default | kept | target |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for (case, dtype, direction, contender), by_allocator in cells.items():
            first = next(iter(by_allocator.values()))
            mine = ours.get((case, dtype, direction, first["allocator"]))
            ratios = [
                _held(row) if (row := by_allocator.get(name)) is not None else ""
                for name in ("default", "kept")
            ]
            label = f"{case}, {_DIRECTIONS[direction]}"
            time = f"{mine['median_ms']:.4g}" if mine and "median_ms" in mine else ""
            lines.append(
                f"| {label} | {dtype} | {contender} | {time} | {ratios[0]} | {ratios[1]} "
                f"| {first['target']:.4g} |"
            )
        parts += [f"**{title}**", "\n".join(lines)]
    lines = [
        f"- {row['case']} {row['dtype']} {row['direction']}, {row['allocator']}: "
        + (
            f"{row['peak_mib']:.0f} MiB at the peak"
            if row["measure"] == "memory"
            else f"{row['ours_minus_this_us']:.1f} us more than {row['contender']}"
        )
        + f", target {row['target']:g}"
        + ("" if row["target_met"] else ", **no**")
        for row in rows
        if row["measure"] in ("memory", "overhead") and "target_met" in row
    ]
    return "\n\n".join([*parts, "\n".join(lines), _summary(rows)]) + "\n"


def _held(row: dict) -> str:
    if "target_met" not in row:  # it failed or was wrong, or ours was
        return "not measured"
    return ("" if row["target_met"] else "**no** ") + _ratio(row)


def _origin(rows: list[dict], shares: bool = True) -> str:
    first = rows[0]
    peaks = [
        f"torch.mm {row['dtype']} {row['matmul_tflops']:.2f} TFLOP/s, "
        f"copy {row['copy_gbps']:.0f} GB/s ({row['allocator']})"
        for row in rows
        if row["measure"] == "peaks"
    ]
    threads = "/".join(str(n) for n in sorted({row["threads"] for row in rows}))
    text = (
        f"Measured {first['date']} on {first['machine']} ({first['cpus']} CPUs, {first['level']}, "
        f"kernels at {first['kernel_level']}), {threads} threads, torch {first['torch']}, "
        f"Python {first['python']}, lam_kernels {first['lam_kernels']}, commit {first['commit']}, "
        f"run {first['run']}."
    )
    if peaks:
        text += " In the same run: " + "; ".join(peaks) + "."
    best = {
        f"{row['peak_tflops']:.2f} TFLOP/s for {row['dtype']} ({row['allocator']})": None
        for row in rows
        if "tflops" in row and "peak_tflops" in row
    }
    if best and shares:
        text += (
            " Shares are of the best torch.mm of the run, in the row's dtype or in fp32: "
            + ", ".join(best) + "."
        )  # fmt: skip
    ratio = "median" if any("ratio" in row for row in rows) else "ratio of medians"
    return text + (
        f"\nTimes are medians of interleaved samples in ms; ours / contender: {ratio}, 20 and 80 "
        "percentiles of the ratios within a round. Allocator: default (where a cell has two lines, "
        "the upper one) = glibc as it is, kept = glibc told to keep its memory. ~ = fewer than "
        "3 samples without other load: all used."
    )


def _section(rows: list[dict]) -> str:
    measure = rows[0]["measure"]
    if measure == "memory":
        head = (
            "case",
            "dtype",
            "allocator",
            "contender",
            "peak MiB",
            "MiB kept afterwards",
            "target",
            "reached",
        )
    elif measure == "overhead":
        head = (
            "case",
            "direction",
            "allocator",
            "contender",
            "us",
            "ours - this, us",
            "target",
            "reached",
        )
    else:
        head = ("case", "dtype", "allocator", "contender", "ms (20 .. 80 %)", "of torch.mm",
                "ours / this", "target", "reached")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    shown = None
    for row in rows:
        key = (row["case"], row["dtype"], row["direction"], row["allocator"])
        cells = _cells(row, measure)
        if key == shown:
            cells[:3] = ["", "", ""]
        shown = key
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _cells(row: dict, measure: str) -> list[str]:
    case = f"{row['case']}: {row['label']}"
    target, reached = "", ""
    if "target" in row:
        target = f"{row['target']:g}" if measure == "overhead" else f"{row['target']:.4g}"
        reached = {True: "yes", False: "**no**", None: "not measured"}[row.get("target_met")]
    kind = row["direction"] if measure == "overhead" else row["dtype"]
    if measure == "time":
        case += f", {_DIRECTIONS[row['direction']]}"
    elif measure == "overhead":
        kind = _DIRECTIONS[kind]
    cells = [case, kind, row["allocator"], row["contender"]]
    if "error" in row or "missing" in row:
        width = 2 if measure != "time" else 3
        why = row.get("error") or row["missing"]
        return [*cells, why, *[""] * (width - 1), target, reached]
    if measure == "memory":
        return [*cells, f"{row['peak_mib']:.0f}", f"{row['kept_mib']:.0f}", target, reached]
    mark = "~" if uncertain(row) else ""
    if measure == "overhead":
        difference = row.get("ours_minus_this_us")
        low, middle, high = (row[k] * 1e3 for k in ("p20_ms", "median_ms", "p80_ms"))
        time = f"{mark}{middle:.1f} ({low:.1f} .. {high:.1f})"
        return [*cells, time, "" if difference is None else f"{difference:.1f}", target, reached]
    share = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else ""
    return [*cells, f"{mark}{_times(row)}", share, _ratio(row), target, reached]


def _times(row: dict) -> str:
    return f"{row['median_ms']:.4g} ({row['p20_ms']:.4g} .. {row['p80_ms']:.4g})"


def _ratio(row: dict) -> str:
    if "ours_over_this" not in row:
        return ""
    text = f"{row['ours_over_this']:.2f}"
    if "ours_over_this_p20" in row:
        text += f" ({row['ours_over_this_p20']:.2f} .. {row['ours_over_this_p80']:.2f})"
    return text


def _summary(rows: list[dict]) -> str:
    held = [row for row in rows if "target" in row]
    reached = sum(row.get("target_met") is True for row in held)
    text = f"Targets reached: {reached} of {len(held)}."
    missed = [row for row in held if row.get("target_met") is not True]
    if missed:
        text += " Not reached: " + "; ".join(_missed(missed)) + "."
    dropped = sum(row.get("dropped", 0) for row in rows)
    taken = sum(row.get("samples", 0) for row in rows)
    return (
        f"{text}\nSamples used: {taken}; dropped because other work kept our threads waiting: "
        f"{dropped}."
    )


def _missed(rows: Iterable[dict]) -> list[str]:
    return [
        f"{row['case']} {row['dtype']} {row['direction']} {row['allocator']}"
        + (f" against {row['contender']}" if row["contender"] != "ours" else "")
        for row in rows
    ]
