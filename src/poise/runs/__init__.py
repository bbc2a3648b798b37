"""A run is a folder: what is trained there, kept, loaded and used again.

In reading order: `pipeline` (`train`: both stages, from pictures to figures), `options` (what surrounds a run), `folder`
(config.json, and whether a run may go on there), `timing` (lengths that fit a budget), `build` (networks and balances from
settings), `log` (metrics.jsonl), `checkpoint`, `plots`; `run` (`load`: the trained model and all it can do), `export`
(samples and codes written to files).
"""
