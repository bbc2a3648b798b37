"""One HTML page in which a browser decodes, encodes and samples a run, without a server.

In reading order:

- `explorer`: `write_page`, the page and its limit of size.
- `scene`: what the page shows: directions in latent space, pictures, codes, priors.
- `graphs`: networks as lists of operations.
- `templates/kernels.js`: these operations in JavaScript and WebAssembly.
- `templates/noise.js`: the noise of a seed, that of `poise sample`.
- `templates/model.js`: codes, priors and networks of the run.
- `templates/explore.js`: the page's controls.
"""

from poise.explore.explorer import write_page

__all__ = ["write_page"]
