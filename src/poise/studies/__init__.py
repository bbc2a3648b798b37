"""Several runs compared: `comparison` (labels times seeds), `reproduction` (published experiments), `results` (JSON files)."""
