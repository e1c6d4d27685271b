"""The lines that a run prints."""

from __future__ import annotations

from .record import uncertain


def headline(facts: dict, settings) -> str:
    place = f"{facts['machine']} ({facts['level']}, kernels at {facts['kernel_level']})"
    if "gpu" in facts:
        place = f"{facts['gpu']} ({facts['gpu_arch']}, driver {facts['driver']}), {place}"
    return (
        f"{place}, {settings.threads} threads, allocator {settings.allocator}, "
        f"torch {facts['torch']}, lam_kernels {facts['lam_kernels']}, commit {facts['commit']}, "
        f"{facts['date']}"
    )


def describe_peaks(row: dict) -> str:
    text = (
        f"\n{row['dtype']}, {row['threads']} threads: torch.mm {row['matmul_tflops']:.4g} TFLOP/s"
    )
    if row["peak_tflops"] > row["matmul_tflops"]:
        text += f" (fp32 {row['peak_tflops']:.4g})"
    return f"{text}, copy {row['copy_gbps']:.1f} GB/s"


def describe(rows: list[dict]) -> str:
    """The lines that a case prints."""
    head = rows[0]
    lines = [
        f"\n{head['case']}  {head['dtype']} {head['direction']}  {head['label']}  "
        f"[{head['allocator']} allocator, {head['threads']} threads]"
    ]
    for row in rows:
        text = f"  {row['contender']:<18}"
        if "missing" in row or "error" in row:
            lines.append(text + row.get("missing", row.get("error")))
            continue
        if row["measure"] == "memory":
            text += f"{row['peak_mib']:9.1f} MiB peak, {row['kept_mib']:.1f} MiB stay"
        else:
            text += _time(row)
        if row["measure"] == "overhead" and "ours_minus_this_us" in row:
            text += f"  ours - this {row['ours_minus_this_us']:.1f} us"
        elif "ours_over_this" in row:
            text += f"  ours/this {row['ours_over_this']:.2f}"
            if "ours_over_this_p20" in row:
                text += f" ({row['ours_over_this_p20']:.2f} .. {row['ours_over_this_p80']:.2f})"
        if "target" in row and "target_met" in row:
            text += (
                f"  target {row['target']:g} {'reached' if row['target_met'] else 'NOT reached'}"
            )
        for word in ("differs", "note"):
            text += f"  [{row[word]}]" if row.get(word) else ""
        lines.append(text)
    return "\n".join(lines)


def _time(row: dict) -> str:
    mark = "~" if uncertain(row) else " "
    text = (
        f"{mark}{row['median_ms']:9.3f} ms ({row['p20_ms']:.3f} .. {row['p80_ms']:.3f})"
        f"  {row['samples']} samples"
    )
    if row["dropped"]:
        text += f", {row['dropped']} dropped"
    if not row["delay_measured"] and row.get("device", "cpu") == "cpu":
        text += ", no run-queue delay on this system: nothing dropped"
    if "tflops" in row:
        text += f"  {row['tflops'] * 1e3:.0f} GFLOP/s {row['share_of_matmul']:.0%} of mm"
    if "share_of_copy" in row:
        text += f", {row['share_of_copy']:.0%} of copy"
    if "peak_mib" in row:
        text += f"  {row['peak_mib']:.1f} MiB"
    if "memory_error" in row:
        text += f"  memory: {row['memory_error']}"
    if row.get("first_call_ms", 0) > 1000 + 3 * row["median_ms"]:
        text += f"  first call {row['first_call_ms'] / 1e3:.1f} s"
    return text
