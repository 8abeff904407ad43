"""Benchmarks: ``python -m benchmarks.cpu`` and ``.gpu``; what limits the CPU's kernels: ``.profile``.

What the GPU's kernels cost: ``.budgets``. Results, with the machine they come from, are in ``benchmarks/results``.
"""
