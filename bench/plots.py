"""Pictures of rows, each narrow enough for a phone. Nothing is in them that is not in the rows."""

from __future__ import annotations

from lam_kernels.optional_package import optional_package

# told apart by colour-blind readers too (Okabe and Ito)
_COLOURS = ["#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F"]
_MARKERS = ["o", "^", "s", "D", "v", "P", "X"]
_USUAL = ("ours", "compile", "eager", "sdpa_nomask")  # the same look on every picture
_WIDTH = 5.4  # inches; text of 10 points stays readable when it fills a phone's screen
_BARS = 28  # a picture
_DIRECTIONS = {"fwd": "forward", "bwd": "backward", "both": "forward + backward", "call": "call"}


def _figure(height: float):
    module = optional_package("matplotlib.figure", "drawing plots")
    return module.Figure(figsize=(_WIDTH, height), dpi=160, layout="constrained")


def _looks(rows: list[dict]) -> dict[str, dict]:
    """Colour and marker of each contender."""
    present = {row["contender"] for row in rows}
    names = list(dict.fromkeys([*_USUAL, *(row["contender"] for row in rows)]))
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(names)
        if name in present
    }


def ratio_bars(rows: list[dict]) -> list:
    """Figures of ours / each contender, with the 20 to 80 percentiles; 1 is equally fast."""
    bars = [row for row in rows if "ours_over_this" in row and row["measure"] == "time"]
    several = len({row["allocator"] for row in bars}) > 1
    looks = _looks(bars)
    figures = []
    for first in range(0, len(bars), _BARS):
        shown = bars[first : first + _BARS]
        figure = _figure(1.1 + 0.27 * len(shown))
        axes = figure.subplots()
        labels = []
        for at, row in enumerate(shown):
            value = row["ours_over_this"]
            spread = None
            if "ours_over_this_p20" in row:
                low, high = row["ours_over_this_p20"], row["ours_over_this_p80"]
                spread = [[max(0, value - low)], [max(0, high - value)]]
            axes.barh(
                at, value, xerr=spread, color=looks[row["contender"]]["color"], height=0.7,
                error_kw={"elinewidth": 1, "capsize": 2},
            )  # fmt: skip
            if "target" in row:
                axes.plot([row["target"]] * 2, [at - 0.4, at + 0.4], color="black", linewidth=1.5)
            labels.append(_name(row, several))
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, max(1.15, *(1.05 * _end(row) for row in shown)))
        axes.set_xlabel("ours / this: below 1 ours is faster")
        axes.grid(axis="x", alpha=0.3)
        figures.append(figure)
    return figures


def _end(row: dict) -> float:
    return max(row["ours_over_this"], row.get("ours_over_this_p80", 0), row.get("target", 0))


def _name(row: dict, with_allocator: bool) -> str:
    text = f"{row['case']} {row['dtype']}"
    text += f" {row['direction']}" if row["direction"] != "both" else ""
    text += f" {row['allocator']}" if with_allocator else ""
    return f"{text} · {row['contender']}"


def over_length(rows: list[dict], field: str):
    """A figure of "median_ms" or "peak_mib" over L on log axes, one panel a dtype and direction;
    None without at least two lengths."""
    measure = "time" if field == "median_ms" else "memory"
    mine = [
        row
        for row in rows
        if "length" in row and row["section"] in ("lengths", "memory lengths")
        and row["measure"] == measure
    ]  # fmt: skip
    panels: dict[tuple, list[dict]] = {}
    for row in mine:
        panels.setdefault((row["dtype"], row["direction"], row["allocator"]), []).append(row)
    panels = {k: v for k, v in panels.items() if len({row["length"] for row in v}) > 1}
    if not panels:
        return None
    looks = _looks(mine)
    figure = _figure(0.4 + 3.1 * len(panels))
    for axes, (key, shown) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for name, look in looks.items():
            line = sorted(
                (r for r in shown if r["contender"] == name and r.get(field, 0) > 0),
                key=lambda r: r["length"],
            )
            if line:
                lengths, values = [r["length"] for r in line], [r[field] for r in line]
                label = name + (f" ({line[0]['differs']})" if line[0].get("differs") else "")
                axes.plot(lengths, values, label=label, linewidth=1.8, markersize=5, **look)
                if field == "median_ms":
                    low, high = [r["p20_ms"] for r in line], [r["p80_ms"] for r in line]
                    axes.fill_between(lengths, low, high, alpha=0.2, color=look["color"])
        dtype, direction, allocator = key
        axes.set(xscale="log", yscale="log", xlabel="L")
        axes.set_title(f"{dtype}, {_DIRECTIONS[direction]}, {allocator} allocator", fontsize=10)
        axes.set_ylabel("ms" if field == "median_ms" else "MiB above the resting size")
        ticks = sorted({row["length"] for row in shown})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def roofline(rows: list[dict]):
    """A figure of TFLOP/s over FLOPs a byte under the peaks of the same run; None without any."""
    peaks = {
        (row["dtype"], row["threads"], row["allocator"]): row
        for row in rows
        if row["measure"] == "peaks"
    }
    timed = [
        row for row in rows if "tflops" in row and row["measure"] == "time" and row["least_bytes"]
    ]
    panels: dict[tuple, list[dict]] = {}
    for row in timed:
        key = (row["dtype"], row["threads"], row["allocator"])
        if key in peaks:
            panels.setdefault(key, []).append(row)
    if not panels:
        return None
    looks = _looks(timed)
    figure = _figure(0.4 + 3.3 * len(panels))
    for axes, (key, shown) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        peak = peaks[key]
        best = [row["peak_tflops"] for row in (peak, *shown) if "peak_tflops" in row]
        compute = max(best, default=peak["matmul_tflops"])
        copy = max(row.get("peak_gbps", peak["copy_gbps"]) for row in (peak, *shown))
        intensities = [row["flops"] / row["least_bytes"] for row in shown]
        knee = compute * 1e12 / (copy * 1e9)
        ends = [min(*intensities, knee) / 2, max(*intensities, knee) * 2]
        roof = [min(compute, x * copy / 1e3) for x in (ends[0], knee, ends[1])]
        axes.plot([ends[0], knee, ends[1]], roof, color="black", linewidth=1.2)
        for name, look in looks.items():
            points = [(r["flops"] / r["least_bytes"], r["tflops"]) for r in shown
                      if r["contender"] == name]  # fmt: skip
            if points:
                axes.scatter(*zip(*points, strict=True), label=name, s=22, alpha=0.8, **look)
        axes.set(xscale="log", yscale="log", ylabel="useful TFLOP/s")
        axes.set_xlabel("FLOPs a byte that has to move")
        dtype, threads, allocator = key
        axes.set_title(
            f"{dtype}, {threads} threads, {allocator}: torch.mm {compute:.3g} TFLOP/s, "
            f"copy {copy:.3g} GB/s",
            fontsize=9,
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
    return figure


def parts(profiles: list, categories: tuple[str, ...]):
    """Stacked bars: where a step's time goes in each profile."""
    figure = _figure(1.4 + 0.75 * len(profiles))
    axes = figure.subplots()
    left = [0.0] * len(profiles)
    for i, kind in enumerate(categories):
        values = [profile.parts_ms[kind] for profile in profiles]
        if any(values):
            colour = "#DDDDDD" if kind == "gaps" else _COLOURS[i % len(_COLOURS)]
            axes.barh(range(len(profiles)), values, left=left, label=kind, color=colour)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(profiles)), [profile.name for profile in profiles])
    axes.set_ylim(len(profiles) - 0.5, -0.5)
    axes.set_xlabel("ms a step")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def memory_over_time(profiles: list):
    """Memory of tensors over the profiled steps; None where none was recorded."""
    shown = [profile for profile in profiles if profile.timeline]
    if not shown:
        return None
    figure = _figure(3.2)
    axes = figure.subplots()
    for i, profile in enumerate(shown):
        at, held = zip(*profile.timeline, strict=True)
        axes.step(at, held, where="post", label=profile.name, linewidth=1.2, color=_COLOURS[1 - i])
    axes.set(xlabel="ms (with the profiler on)", ylabel="MiB of tensors above the lowest")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure
