"""Several runs compared: `comparison` (labels times seeds), `reproduction` (published experiments), `results` (one JSON a run)."""
