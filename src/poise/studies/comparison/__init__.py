"""Balances and models compared: the same images, network, order, budget and protocol, several seeds, one table.

In reading order: `measuring` (how a run is evaluated), `plan` (labels and seeds to tasks), `worker` and `execution` (who does
the tasks), `statistics` and `tables` (what they say), `experiment` (all of it, in a folder), `comparing` (`poise compare`).
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
