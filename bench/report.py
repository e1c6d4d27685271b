"""Rows -> plots as PNG, one self-contained page, and the README's table.

The page is one HTML file without scripts: pictures are inside it, tables scroll sideways on a
narrow screen, everything that comes from a results file is escaped.
"""

from __future__ import annotations

import argparse
import base64
import io
import shlex
import sys
from html import escape
from pathlib import Path

from lam_kernels.training.atomic_write import atomic_write

from . import plots, record, table
from .cases import SECTIONS

EPILOG = """\
examples
  python -m bench report
      the newest results file: out/bench/index.html (send it to your phone: it is one file) and its
      plots as PNG beside it
  python -m bench report --results bench/results/FILE.jsonl --run 20261121T070636Z --output out/page
  python -m bench report --into README.md --picture bench/results/overview.png
      what `make bench` does after measuring

what is on the page
  ratios          our time / each contender's, with the spread; the short black line is a target
  time, memory    over the length, on log axes
  roofline        useful FLOPs a second under what this machine's torch.mm and copy reached in the
                  same run: near the slanted line a call waits for memory, near the flat one it
                  computes
  tables          every row, with what failed and why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", type=Path, help="default: the newest in bench/results")
    add("--run", dest="run_id", help="id (default: the file's last run of each whole set)")
    add("--output", type=Path, default=Path("out/bench"), help="folder (default: out/bench)")
    add("--into", type=Path,
        help="also the short table, between bench:begin and bench:end of a file")  # fmt: skip
    add("--picture", type=Path, help="also the time over the length, as PNG at this path")


def report(args: argparse.Namespace) -> int:
    path = args.results or record.newest()
    rows = record.read(path)
    runs = [table.choose_run(rows, args.run_id)] if args.run_id else table.last_runs(rows)
    written = write(runs, args.output, path.name)
    for one in written:
        print(one)
    if args.into or args.picture:
        shown = next((run for run in runs if run[0].get("set") == "overview"), runs[0])
        if args.picture:
            figure = plots.over_length(shown, "median_ms")
            if figure is None:
                raise ValueError("--picture: this run has no times over the length")
            atomic_write(args.picture, png(figure))
        if args.into:
            text = table.render_short(shown)
            args.into.write_text(table.insert(args.into.read_text(), text))
    return 0


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figures_of(rows: list[dict]) -> dict[str, bytes]:
    """Name -> PNG of every plot that these rows have something for."""
    found = {}
    time, memory = (plots.over_length(rows, field) for field in ("median_ms", "peak_mib"))
    for name, figure in (("time", time), ("memory", memory), ("roofline", plots.roofline(rows))):
        if figure is not None:
            found[name] = png(figure)
    bars = {f"ratios-{n}": png(figure) for n, figure in enumerate(plots.ratio_bars(rows), 1)}
    return bars | found


_TITLES = {
    "ratios": "Our time / each contender's",
    "time": "Time over the length",
    "memory": "Peak memory over the length",
    "roofline": "What bounds it",
}


def write(runs: list[list[dict]], folder: Path, source: str) -> list[Path]:
    """The page and its plots; returns their paths, the page first."""
    written, sections = [], []
    for rows in map(table.with_run_peaks, runs):
        name = rows[0].get("set", "part")
        pictures = figures_of(rows)
        for kind, data in pictures.items():
            path = folder / f"{name}-{kind}.png"
            atomic_write(path, data)
            written.append(path)
        sections.append(_section(rows, pictures))
    page = folder / "index.html"
    atomic_write(page, _page(runs, sections, source))
    return [page, *written]


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
  padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
img { width: 100%; max-width: 44rem; height: auto; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, td.text { text-align: left; }
.label { position: sticky; left: 0; max-width: 86vw; white-space: normal; padding-top: .6rem; }
.aside { white-space: normal; max-width: 9rem; opacity: .7; font-size: .75rem; }
.why { white-space: normal; max-width: min(36rem, 62vw); }
.good { color: #007a4d; font-weight: 600; } .bad { color: #c8440c; font-weight: 600; }
@media (prefers-color-scheme: dark) { .good { color: #3ddc97; } .bad { color: #ff9466; } }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
.quiet { opacity: .75; font-size: .9rem; }
""".strip()


def _page(runs: list[list[dict]], sections: list[str], source: str) -> str:
    first = runs[0][0]
    command = shlex.join(["python", "-m", "bench", "report", "--results", source])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lam_kernels: measured {escape(str(first["date"]))}</title>
<style>{_STYLE}</style></head><body>
<h1>What attention costs</h1>
<p>Each contender's results and gradients were compared with a float64 reference before its time was
taken. Samples of all contenders alternate in one process; times are medians, with the 20th and 80th
percentiles; ~ marks fewer than 3 samples without other load. Below 1, ours is faster.</p>
{"".join(sections)}
<p class="quiet">Every number on this page is from {escape(source)}; made by
<code>{escape(command)}</code>, Python {escape(sys.version.split()[0])}.</p>
</body></html>
"""


_SET_TITLES = {
    "overview": "Overview", "workloads": "Workloads of real models", "lengths": "Over the length",
    "foundation": "Held targets", "low-rank": "Masks that are never stored", "gpu": "On the GPU",
    "windows": "Windows", "two-maps": "Global and local attention together",
    "part": "Chosen cases", "smoke": "Smoke",
}  # fmt: skip


def _section(rows: list[dict], pictures: dict[str, bytes]) -> str:
    first = rows[0]
    place = f"{first['machine']}, {first['cpus']} CPUs, kernels at {first['kernel_level']}"
    if first.get("gpu"):
        place = f"{first['gpu']} (driver {first.get('driver')}), {place}"
    parts = [
        f"<h2>{escape(_SET_TITLES.get(first.get('set'), str(first.get('set'))))}</h2>",
        f"<p>{escape(place)}, torch {escape(str(first['torch']))}, lam_kernels "
        f"{escape(str(first['lam_kernels']))}, commit {escape(str(first['commit']))}, "
        f"{escape(str(first['date']))}, run {escape(str(first['run']))}.</p>",
        _headline(rows),
    ]
    for kind, title in _TITLES.items():
        mine = [data for name, data in pictures.items() if name.partition("-")[0] == kind]
        images = [_image(data, title) for data in mine]
        parts += [f"<h3>{title}</h3>", *images[:1]] if images else []
        if len(images) > 1:
            parts.append(f"<details><summary>{len(images) - 1} more</summary>")
            parts += [*images[1:], "</details>"]
    for section, title in SECTIONS.items():
        mine = [row for row in rows if row.get("section") == section]
        if mine:
            parts.append(
                f"<details><summary>{escape(title)}: {len(mine)} rows</summary>"
                f'<div class="wide">{_table(mine)}</div></details>'
            )
    return "\n".join(parts)


def _image(data: bytes, title: str) -> str:
    code = base64.b64encode(data).decode()
    return f'<img alt="{title}" src="data:image/png;base64,{code}">'


def _headline(rows: list[dict]) -> str:
    """What somebody on a phone wants first: how many comparisons, won or lost, what failed."""
    ratios = [row["ours_over_this"] for row in rows if row.get("measure") == "time"
              and "ours_over_this" in row]  # fmt: skip
    lines = []
    if ratios:
        ahead = sum(r < 1 for r in ratios)
        lines.append(f"Ours is faster in {ahead} of {len(ratios)} comparisons")
    held = [row for row in rows if "target" in row]
    if held:
        reached = sum(row.get("target_met") is True for row in held)
        lines.append(f"targets reached: {reached} of {len(held)}")
    failed = sum("error" in row for row in rows)
    absent = sum("missing" in row for row in rows)
    if failed:
        lines.append(f"{failed} contenders failed or were wrong")
    if absent:
        lines.append(f"{absent} measurements are of what this version does not have")
    samples, dropped = (sum(row.get(k, 0) for row in rows) for k in ("samples", "dropped"))
    lines.append(f"{samples} samples, {dropped} more dropped because other work ran")
    return f"<p><strong>{escape('; '.join(lines))}.</strong></p>"


_COLUMNS = (
    "contender", "ms", "ours / this", "ms, 20 .. 80 %", "of mm", "of copy", "MiB", "target",
)  # fmt: skip


def _table(rows: list[dict]) -> str:
    lines = ["<table><thead><tr>", *(f"<th>{name}</th>" for name in _COLUMNS)]
    lines.append("</tr></thead><tbody>")
    shown = None
    for row in rows:
        key = (row["case"], row["dtype"], row["direction"], row["allocator"], row["threads"])
        if key != shown:
            label = f"{row['case']}: {row['label']}, {row['dtype']} {row['direction']}, "
            label += f"{row['allocator']} allocator, {row['threads']} threads"
            lines.append(
                f'<tr><th colspan="{len(_COLUMNS)}"><div class="label">{escape(label)}</div></th>'
                "</tr>"
            )
        shown = key
        lines.append(f"<tr>{_cells(row)}</tr>")
    return "".join(lines) + "</tbody></table>"


def _cells(row: dict) -> str:
    name = escape(row["contender"])
    for word in ("differs", "note"):
        name += f'<div class="aside">{escape(str(row[word]))}</div>' if row.get(word) else ""
    if "error" in row or "missing" in row:
        why = escape(str(row.get("error") or row["missing"]))
        return (
            f'<td>{name}</td><td class="text" colspan="{len(_COLUMNS) - 1}">'
            f'<div class="why">{why}</div></td>'
        )
    time = spread = ""
    if "median_ms" in row:
        time = ("~" if record.uncertain(row) else "") + f"{row['median_ms']:.4g}"
        spread = f"{row['p20_ms']:.4g} .. {row['p80_ms']:.4g}"
    ratio = ""
    if "ours_over_this" in row:
        kind = "good" if row["ours_over_this"] < 1 else "bad"
        ratio = f'<span class="{kind}">{row["ours_over_this"]:.2f}</span>'
        if "ours_over_this_p20" in row:
            ratio += f" ({row['ours_over_this_p20']:.2f} .. {row['ours_over_this_p80']:.2f})"
    shares = [f"{row[k]:.0%}" if k in row else "" for k in ("share_of_matmul", "share_of_copy")]
    memory = f"{row['peak_mib']:.1f}" if "peak_mib" in row else ""
    if "memory_error" in row:
        memory = f'<div class="aside">{escape(row["memory_error"])}</div>'
    target = ""
    if "target" in row:
        kind = "good" if row.get("target_met") else "bad"
        target = f'<span class="{kind}">{row["target"]:.4g}</span>'
    cells = (name, time, ratio, spread, *shares, memory, target)
    return "".join(f"<td>{cell}</td>" for cell in cells)
