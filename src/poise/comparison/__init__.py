"""Balances and models compared: the same images, network, order, budget and protocol, several seeds, one table.

In reading order: `measuring` (how a run is evaluated), `plan` (labels and seeds to tasks), `worker` and `execution` (who does
the tasks), `statistics` and `tables` (what they say), `comparing` (all of it).
"""

from poise.comparison.comparing import Comparison, compare
from poise.comparison.tables import differences, markdown, speed, table

__all__ = ["Comparison", "compare", "differences", "markdown", "speed", "table"]
