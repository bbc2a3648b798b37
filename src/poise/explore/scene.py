"""What the page shows of a run: directions in latent space, pictures, codes, priors, networks."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.data import gather
from poise.data.decoding import to_bytes, to_picture
from poise.errors import InputError, RunError
from poise.explore.graphs import Graph, graph_of
from poise.latent import ACTIVE_VARIANCE, variance_law
from poise.priors import FlowPrior, MixturePrior, NormalPrior, Prior, RenormalisedPrior
from poise.runs.parts import Decoder, Encoder, Sampler, priors_of
from poise.runs.run import Run
from poise.shapes import Images, Latents
from poise.support.html import data_uri
from poise.support.seeds import drawn
from poise.variants import PRIORS

SLIDERS = 8
OF_MIXTURE = ("bounds", "means", "factors")  # its arrays
WHITE_OF_BROWSERS = (None, 255, 65535)  # values that browsers show as white
LARGEST_TILE = 48  # pixels of a picture's side on the page
LARGEST_PNG = 400_000  # bytes; larger sheets of pictures become JPEG
JPEG_QUALITY = 88


@dataclass
class Scene:
    """Hold everything that a page shows or computes with.

    Attributes:
        values: plain values for JSON.
        arrays: float32 arrays by name.
        networks: graphs by name: "decoder", "encoder", and those of priors.
        notes: what the page lacks, in sentences.
    """

    values: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    networks: dict[str, Graph] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out_encoder(self) -> None:
        """Remove the encoder, so that a large decoder has room."""
        if self.networks.pop("encoder", None) is not None:
            self.notes.append("Images of your own cannot be encoded: the page would be too large.")

    def leave_out_mixture(self) -> None:
        """Remove the mixture, whose covariances are large with many latents or classes."""
        kept = [prior for prior in self.values["priors"] if prior["kind"] != "mixture"]
        if len(kept) < len(self.values["priors"]):
            number = len(self.arrays["means"])
            self.notes.append(
                f"No prior mixture: its {number} covariances are too large for a page."
            )
            for name in OF_MIXTURE:
                del self.arrays[name]
        self.values["priors"] = kept


def scene_of(run: Run, priors: Sequence[str] | None, pictures: int) -> Scene:
    """Return all values of the page of a run.

    Args:
        run: the run. Its codes are needed.
        priors: names of the priors to sample from. None: all that the run has.
        pictures: largest number of pictures.

    Raises:
        InputError: the decoder cannot run in a page, or the run lacks a given prior.
        RunError: stage 1 is not finished.
    """
    codes, latents = run.codes, run.recipe.network.latent_dim
    scene, shape = Scene(), run.data["shape"]
    device = run.device
    scene.networks["decoder"] = graph_of(
        Decoder(run.first.vae), [torch.zeros(1, latents, device=device)], "the decoder"
    )
    try:
        if run.levels not in WHITE_OF_BROWSERS:
            raise InputError(f"the value {run.levels} is white in this run, which browsers ignore")
        scene.networks["encoder"] = graph_of(
            Encoder(run.first.vae), [torch.zeros(1, *shape, device=device)], "the encoder"
        )
    except InputError as error:
        scene.notes.append(f"Images of your own cannot be encoded: {error}.")
    scene.values = {
        "shape": shape,
        "latents": latents,
        "straight": run.deterministic,
        "directions": _directions(scene, codes.mean, variance_law(codes.mean, codes.logvar)),
        "pictures": _pictures(scene, run, pictures),
        "priors": [
            _prior(scene, name, prior, default=name == run.default_prior)
            for name, prior in priors_of(run, priors, scene.notes)
        ],
    }
    generation = run.recipe.generation
    if generation.adjust_variance:
        scene.notes.append("Samples are shown without the adjustment of their variance.")
    if generation.adjust_reconstructions or generation.reconstruct_from != "mean":
        scene.notes.append(
            "Reconstructions are those of posterior means, and their variance is not adjusted."
        )
    of_all_classes = run.classes and any(p["kind"] == "flow" for p in scene.values["priors"])
    # Whether image i of a seed is that of `poise sample`.
    scene.values["same"] = not (generation.adjust_variance or of_all_classes)
    return scene


def _directions(scene: Scene, means: Latents, total: Tensor) -> dict[str, list[str]]:
    """Set the centre of the codes and the directions of the sliders, and return their names.

    A step of 1 along a direction is one standard deviation of the codes.
    """
    means = means.double()
    variances = means.var(0, correction=0)
    active = variances.argsort(descending=True)[:SLIDERS]
    eigenvalues, vectors = torch.linalg.eigh(
        torch.cov(means.T, correction=0).reshape(len(variances), len(variances))
    )
    eigenvalues, vectors = eigenvalues.flip(0)[:SLIDERS].clamp_min(0), vectors.flip(1)[:, :SLIDERS]
    scene.arrays["centre"] = means.mean(0)
    scene.arrays["active"] = torch.diag(total.sqrt())[active]
    noise = vectors.square().T @ (total.double() - variances)  # E[s^2] along each direction
    scene.arrays["principal"] = (vectors * (eigenvalues + noise).sqrt()).T
    scene.arrays["plane"] = vectors[:, :2].T
    share = eigenvalues / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "active": [
            f"Latent {k + 1}, Var(μ) {v:.2f}{'' if v > ACTIVE_VARIANCE else ', inactive'}"
            for k, v in zip(active.tolist(), variances[active].tolist(), strict=True)
        ],
        "principal": [
            f"Direction {k}, {part:.0%} of the variance" for k, part in enumerate(share.tolist(), 1)
        ],
    }


def _pictures(scene: Scene, run: Run, most: int) -> dict[str, Any]:
    """Set the codes of some test images, and return a sheet of the images.

    If the data cannot be read again, the pictures are decoded codes of training images.
    """
    try:
        images = run.test_images()
        if not len(images):
            raise InputError("the data have no test images")
        shown = gather(images, drawn(len(images), most))
        codes, kind = run.encode(shown).mean, "test images"
    except (InputError, RunError, OSError) as error:
        scene.notes.append(f"The pictures are reconstructions of training images, since {error}.")
        codes, kind = run.codes.mean[drawn(len(run.codes), most)], "training images, reconstructed"
        with torch.no_grad():
            parts = [Decoder(run.first.vae)(part.to(run.device)).cpu() for part in codes.split(100)]
        shown = torch.cat(parts)
    scene.arrays["codes"] = codes
    sheet, columns, tile = _sheet(shown)
    return {"count": len(shown), "columns": columns, "tile": tile, "sheet": sheet, "kind": kind}


def _sheet(images: Images) -> tuple[str, int, int]:
    """Return one picture of all images as a data URI, its columns, and the side of a tile."""
    side = min(images.shape[-1], LARGEST_TILE)
    if side < images.shape[-1]:
        images = torch.nn.functional.interpolate(images, (side, side), mode="area")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    tiles = images.new_zeros(rows * columns, *images.shape[1:])
    tiles[: len(images)] = images
    placed = to_bytes(tiles).unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    pixels = np.ascontiguousarray(placed.flatten(0, 1).flatten(1, 2))
    picture, file = to_picture(pixels), io.BytesIO()
    kind = "png" if pixels.nbytes < LARGEST_PNG else "jpeg"
    picture.save(file, kind, **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return data_uri(file.getvalue(), kind), columns, side


def _prior(scene: Scene, name: str, prior: Prior, *, default: bool) -> dict[str, Any]:
    """Return the values of a prior, and set its arrays and its network."""
    factor = 1.0
    if isinstance(prior, RenormalisedPrior):
        prior, factor = prior.prior, prior.factor
    noise = len(prior.flow.mean) if isinstance(prior, FlowPrior) else prior.noise_dims
    return _sampler(scene, prior, name) | {
        "name": name,
        "words": PRIORS[name].words,
        "noise": noise,
        "factor": factor,
        "default": default,
    }


def _sampler(scene: Scene, prior: Prior, name: str) -> dict[str, Any]:
    match prior:
        case NormalPrior():
            return {"kind": "normal"}
        case MixturePrior():
            values = prior.weights.cumsum(0)[:-1], prior.means, prior.factors
            scene.arrays |= zip(OF_MIXTURE, values, strict=True)
            return {"kind": "mixture"}
        case FlowPrior():
            flow = prior.flow
            zeros = torch.zeros(1, len(flow.mean), device=flow.mean.device)
            inputs = [zeros, zeros[:, 0]]
            if flow.classes:
                scene.notes.append(
                    "The flow is that of all classes, without guidance: this page takes no label. "
                    "Its images are not those of `poise sample`."
                )
            scene.networks[name] = graph_of(flow, inputs, "the flow")
            scene.arrays |= {"flow mean": flow.mean, "flow std": flow.std}
            return {"kind": "flow", "steps": prior.steps, "solver": prior.solver}
    device = next((p.device for p in prior.parameters()), torch.device("cpu"))
    noise = torch.zeros(1, prior.noise_dims, device=device)
    scene.networks[name] = graph_of(Sampler(prior), [noise], f"the prior {name}")
    return {"kind": "traced"}
