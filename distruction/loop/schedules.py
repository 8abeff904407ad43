"""Step sizes and shares of evidence over a run."""

import math


def cosine(step: int, steps: int) -> float:
    """Cosine decay from 1 at step 0 towards 0 at step ``steps``."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def rising(steps: int) -> list[float]:
    """Shares, with sum 1, that rise geometrically by 1000 over the first 70 % of ``steps`` and then stay.

    With equal shares the first steps are long while the stds are wide, and BGD is a chaotic map: rounding grows until
    two backends' stds have no digit in common. With rising ones it grows little where a well trained model gets
    1000 steps or more.
    """
    weights = [1000.0 ** min(0.0, step / (0.7 * steps) - 1.0) for step in range(steps)]
    total = math.fsum(weights)
    return [w / total for w in weights]
