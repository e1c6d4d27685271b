"""The bench: what attention costs with these kernels and with what one would use otherwise.

cases.py      what is measured, and the targets
baselines.py  the contenders: ours and the peers, as callables
check.py      nobody's time is printed before the results are right
timing.py     interleaved samples, the filter against other load, percentiles
memory.py     peak memory of one call in a fresh process
cost.py       FLOPs and bytes as formulas
measure.py    one case -> rows
record.py     a row of results/*.jsonl and the machine it came from
table.py      rows -> the README's table
"""
