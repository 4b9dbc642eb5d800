"""Benchmark of the kernels: correctness first, then speed at the real sizes of the five methods.

    python -m kernels.bench                     on this machine's GPU, else its CPU
    python -m kernels.bench --check             only the largest error per case
    python -m kernels.bench --threads 1         CPU threads (ratios in the documentation are for 1)
    python -m kernels.bench --json bench.jsonl  the rows of the table as JSON lines

How a kernel takes part: a section of this file makes `Case` objects (see the class) in a function that `SECTIONS`
lists by kernel name. Everything else (timing, table, JSON) is common to all kernels and knows none of them.
"""
SECTIONS = {}       # name -> function () -> list of Case; filled below, by one section per kernel
