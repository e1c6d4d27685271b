"""The bench: what attention costs with these kernels and with what one would use otherwise.

ops/          one page an op: operands, reference, FLOPs and bytes, peers
cases.py      what is measured, in named sets, and the targets; workloads.py: W1 to W22
request.py    the options of `run` -> cases; run.py: cases -> rows; lines.py: rows -> the screen
contender.py  a peer on a case as a zero-argument call
check.py      nobody's time is printed before the results are right
timing.py     interleaved samples, the filter against other load, CUDA events, percentiles
memory.py     peak memory of one call
measure.py    one case -> rows
record.py     a row of results/*.jsonl and the machine it came from
table.py      rows -> the README's table
"""
