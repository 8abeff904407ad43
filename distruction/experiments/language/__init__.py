"""Forgetting in a language model, from pretraining to tables: the preset ``language``.

A GPT-2 of 0.7 M weights is pretrained on what Python's standard library says of itself, then learns by heart four facts
of each of 100 made-up authors and the keys of 20 vaults. Three requests, each answered by retraining, by AdamW on the
losses of other papers and by `distruction.forget`:

- ``codes``: one kind of fact, the codes of all authors, goes; the other 300 answers stay;
- ``authors``: ten authors go with all their facts; 90 similar ones stay;
- ``canaries``: the 20 keys go; all facts stay.

Step sizes were chosen on seed 0, which is not among the seeds of the tables. A run that was stopped goes on with what
is missing.
"""

from .runs import SCENARIOS, SEEDS, run

__all__ = ["SCENARIOS", "SEEDS", "run"]
