"""Forgetting in a language model, from pretraining to tables: see ``python -m benchmarks.language --help``."""
