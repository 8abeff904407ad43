"""Benchmarks: ``python -m benchmarks.cpu``. Results, with the machine they come from, are in ``benchmarks/results``."""
