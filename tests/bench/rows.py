"""Made-up rows of a results file, shared by the tests of table, report and compare."""


def row(**changes) -> dict:
    """A timed row of ours; None leaves a field out."""
    made = {
        "run": "r1", "set": "overview", "date": "2026-01-02", "machine": "A CPU", "cpus": 2,
        "level": "avx2", "kernel_level": "avx2", "torch": "2.13.0", "python": "3.11.7",
        "lam_kernels": "0.1.0", "commit": "abc1234", "threads": 2, "allocator": "default",
        "case": "length-L128", "section": "lengths", "label": "B1 H8 L128 D64", "measure": "time",
        "dtype": "fp32", "direction": "both", "contender": "ours", "median_ms": 2.0, "p20_ms": 1.98,
        "p80_ms": 2.02, "samples": 9, "dropped": 1, "disturbed": False, "delay_measured": True,
        "share_of_matmul": 0.5, "share_of_copy": 0.1, "tflops": 0.1, "gbps": 2.0, "flops": 10**9,
        "least_bytes": 10**7, "length": 128, "device": "cpu", "problem": "Problem(Lq=128)",
    } | changes  # fmt: skip
    return {name: value for name, value in made.items() if value is not None}


def timed(median_ms: float, **changes) -> dict:
    """A row with that median and a spread of two per cent around it."""
    spread = {"median_ms": median_ms, "p20_ms": 0.99 * median_ms, "p80_ms": 1.01 * median_ms}
    return row(**spread | changes)


def peaks(**changes) -> dict:
    measured = ("median_ms", "p20_ms", "p80_ms", "samples", "disturbed", "direction", "label",
                "problem", "length", "flops", "least_bytes", "tflops", "gbps",
                "dropped")  # fmt: skip
    made = dict.fromkeys(measured) | {
        "case": "peaks", "section": "peaks", "measure": "peaks", "contender": "torch",
        "matmul_tflops": 0.2, "peak_tflops": 0.25, "copy_gbps": 20.0,
    }  # fmt: skip
    return row(**made | changes)
