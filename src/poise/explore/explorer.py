"""Write the page: one file that opens from disk, and that forbids the browser all network access.

A page has no kernels of ONNX: it runs the networks by small kernels of its own. They compute 40
operations of ATen, which all networks of Poise are made of. onnxruntime-web would add 4.9 MB.
"""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from poise.errors import InputError
from poise.explore.scene import Scene, scene_of
from poise.runs.run import Run
from poise.support.files import write_file
from poise.support.html import templates
from poise.support.version import __version__

MOST_BYTES = 128_000_000  # of a page. The networks of 64-pixel faces take 103 MB
PICTURES = 240


def write_page(
    run: Run,
    out: str | Path = "explore.html",
    *,
    priors: Sequence[str] | None = None,
    pictures: int = PICTURES,
) -> Path:
    """Write a page to explore a run in a browser, and return its path.

    The page has sliders along directions of latent space, samples of each prior by seed, the path
    between two images, the reconstruction of an image of one's own, and a map of the codes. Image i
    of a seed is that of `run.sample`, up to rounding.

    Args:
        run: the run. Stage 1 must be finished.
        out: path of the page, an .html file.
        priors: names of the priors to sample from. None: all that the run has.
        pictures: largest number of pictures, at least 2. They are test images. If the data cannot
            be read again, they are reconstructions of training images.

    Raises:
        InputError: `out` is not the name of an .html file, the run lacks a prior, a network has an
            operation for which a page has no kernel, or the page would be too large.
        RunError: stage 1 is not finished, or the page cannot be written.

    Example:
        >>> poise.explore.write_page(poise.load("runs/digits"), "digits.html")  # doctest: +SKIP
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(f"the page must be an .html file, not {out}")
    if pictures < 2:
        raise InputError(f"the number of pictures must be at least 2, not {pictures}")
    scene = scene_of(run, priors, pictures)
    if priors is None and sum(sizes_of(scene).values()) > MOST_BYTES:
        scene.leave_out_mixture()
    if sum(sizes_of(scene).values()) > MOST_BYTES:
        scene.leave_out_encoder()
    check_size(scene)
    write_file(out, page(run, scene).encode(errors="backslashreplace"))
    return out


def check_size(scene: Scene) -> None:
    """Check that the page is not too large.

    Raises:
        InputError: it is.
    """
    sizes = sizes_of(scene)
    total = sum(sizes.values())
    if total > MOST_BYTES:
        parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in sizes.items())
        raise InputError(
            f"the page would have {total / 1e6:.0f} MB ({parts}), and at most "
            f"{MOST_BYTES / 1e6:.0f} MB are allowed: choose fewer priors (--priors normal), "
            "or use `poise export`"
        )


def sizes_of(scene: Scene) -> dict[str, int]:
    """Return the bytes of each network on the page, and of all arrays."""
    parts = {name: [*graph.constants.values()] for name, graph in scene.networks.items()}
    parts["mixture, codes and other arrays"] = [*scene.arrays.values()]
    return {
        name: sum(4 * tensor.numel() for tensor in tensors) * 4 // 3
        for name, tensors in parts.items()
    }


def page(run: Run, scene: Scene) -> str:
    """Return the HTML of the page."""
    channels, size, _ = run.data["shape"]
    template = templates("poise.explore", autoescape=True).get_template("explore.html")
    return template.render(
        title=run.folder.resolve().name,
        subtitle=f"recipe {run.recipe.name}, network {run.recipe.network.kind}, "
        f"{size}×{size} {'grey' if channels == 1 else 'colour'} images, "
        f"{run.recipe.network.latent_dim} latents",
        values=scene.values
        | {
            "arrays": [[name, list(array.shape)] for name, array in scene.arrays.items()],
            "networks": {name: graph.description() for name, graph in scene.networks.items()},
        },
        scene=scene,
        arrays=encoded(scene.arrays.values()),
        networks={name: encoded(g.constants.values()) for name, g in scene.networks.items()},
        version=__version__,
    )


def encoded(tensors: Iterable[Tensor]) -> str:
    """Return tensors as base64 of float32, one after another."""
    parts = [tensor.detach().cpu().to(torch.float32).contiguous() for tensor in tensors]
    return base64.b64encode(b"".join(part.numpy().tobytes() for part in parts)).decode()
