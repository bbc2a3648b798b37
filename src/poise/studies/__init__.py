"""Studies of several runs.

- `comparison`: labels times seeds.
- `reproduction`: published experiments.
- `results`: JSON files of finished runs.
"""
