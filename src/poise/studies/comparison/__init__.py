"""Comparisons of balances and models: same images, network, order, budget and protocol.

In reading order:

- `measuring`: evaluation of a run.
- `plan`: labels and seeds to tasks.
- `worker`, `execution`: processes that do the tasks.
- `statistics`, `tables`: means, paired differences, tables.
- `experiment`: the whole experiment, in a folder.
- `comparing`: `poise compare`.
"""

from poise.studies.comparison.comparing import BALANCES, compare
from poise.studies.comparison.experiment import Comparison, Experiment, conduct
from poise.studies.comparison.tables import differences, markdown, speed, table

__all__ = [
    "BALANCES",
    "Comparison",
    "Experiment",
    "compare",
    "conduct",
    "differences",
    "markdown",
    "speed",
    "table",
]
