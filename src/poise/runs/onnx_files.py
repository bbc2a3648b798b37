"""Write the networks of a run as ONNX files, and compare them with PyTorch.

encoder.onnx      images (n, channels, height, width), in [0, 1]
                  -> latent_mean, latent_logvar (n, latents)
decoder.onnx      latents (n, latents) -> images, in [0, 1]
prior-NAME.onnx   noise (n, noise), standard normal -> latents

Samples are decoder(prior(noise)). Renormalisation is part of a prior's file. The steps of a flow's
solver are unrolled, so that a runtime needs no loop. Each file holds its weights, and the sizes of
its inputs, the versions and the recipe as metadata. The number n of images is free.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, MissingExtraError, RunError
from poise.runs.parts import Decoder, Encoder, Sampler, priors_of
from poise.runs.run import Run
from poise.support.files import write_file
from poise.support.seeds import generator, noise_per_image
from poise.support.version import __version__
from poise.variants import PRIORS, PriorName

if TYPE_CHECKING:
    from onnx import ModelProto  # pyright: ignore[reportMissingImports]

OPSET = 18
TOLERANCE = 1e-4  # of a value of size 1 or less; in proportion to larger values
MOST_BYTES = 2**31 - 2**20  # of one protobuf message
EXAMPLES = 3  # a batch of one would be taken for a fixed size
COMPARED = 5  # images of a comparison
# The exporter names values inside a graph after operations: an output "mean" could clash.
MEAN_AND_LOGVAR = ("latent_mean", "latent_logvar")


@dataclass(frozen=True)
class Exported:
    """One ONNX file.

    Attributes:
        path: the file.
        size: its size in bytes.
        difference: largest difference from PyTorch over a few inputs: absolute up to values of 1,
            relative above.
    """

    path: Path
    size: int
    difference: float


@dataclass(frozen=True)
class Part:
    """A network to export: its module, example input, and the names of inputs and outputs."""

    name: str
    module: nn.Module
    example: Tensor
    given: str
    results: tuple[str, ...]
    facts: dict[str, Any]


def export_onnx(
    run: Run, out: str | Path, *, priors: Sequence[PriorName] | None = None
) -> tuple[list[Exported], list[str]]:
    """Write the encoder, the decoder and the priors of a run as ONNX files.

    Each file is run in onnxruntime and compared with PyTorch before it is written.

    Args:
        run: the run.
        out: folder of the files. It is made if it does not exist.
        priors: names of the priors to export. None: all that the run has.

    Returns:
        The files, and notes about priors that were left out.

    Raises:
        InputError: `out` is a file, the run lacks a prior, or a network cannot be exported.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        RunError: a file's results differ from PyTorch's by more than 1e-4, or cannot be written.
    """
    out, notes = Path(out), list[str]()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give the name of a folder")
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportMissingImports]
        import onnxruntime  # noqa: F401  # pyright: ignore[reportMissingImports]
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("export to ONNX", "export") from error
    if run.recipe.generation.adjust_variance:
        notes.append("the files do not adjust the variance of samples (adjust_variance)")
    written = []
    for part in _parts(run, priors, notes):
        model = to_onnx(part)
        difference = compare(part, model)
        path = out / f"{part.name}.onnx"
        content = model.SerializeToString()
        write_file(path, content)
        written.append(Exported(path, len(content), difference))
    return written, notes


def _parts(run: Run, names: Sequence[PriorName] | None, notes: list[str]) -> Iterator[Part]:
    network, device = run.recipe.network, run.device
    common = {
        "poise": __version__,
        "recipe": run.recipe.name,
        "network": network.kind,
        "latents": network.latent_dim,
        "image_shape": " ".join(map(str, run.data["shape"])),
        "data_checksum": run.data["checksum"],
        "checkpoint": run.position,
    }
    images = torch.rand(EXAMPLES, *run.data["shape"], generator=generator("onnx")).to(device)
    codes = noise_per_image(EXAMPLES, network.latent_dim, seed=0).to(device)
    vae = run.first.vae
    yield Part("encoder", Encoder(vae), images, "images", MEAN_AND_LOGVAR, common)
    yield Part("decoder", Decoder(vae), codes, "latents", ("images",), common)
    for name, prior in priors_of(run, names, notes):
        noise = noise_per_image(EXAMPLES, prior.noise_dims, seed=0).to(device)
        facts = common | {"prior": name, "label": PRIORS[name].label, "noise": prior.noise_dims}
        yield Part(f"prior-{name}", Sampler(prior), noise, "noise", ("latents",), facts)


def to_onnx(part: Part) -> "ModelProto":
    """Return a network as an ONNX model, whose first dimension is free.

    Raises:
        InputError: the network has an operation that ONNX or its exporter lacks, or is too large.
    """
    from onnx.helper import set_model_props  # pyright: ignore[reportMissingImports]

    size = sum(p.numel() * p.element_size() for p in part.module.parameters())
    if size > MOST_BYTES:
        raise InputError(f"{part.name} has {size / 1e9:.1f} GB, and an ONNX file at most 2 GB")
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                part.module.eval(),
                (part.example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[part.given],
                output_names=list(part.results),
                dynamic_shapes=({0: torch.export.Dim("n")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises dozens of types
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise InputError(
            f"{part.name} cannot be exported to ONNX ({type(cause).__name__}: {reason}): "
            "use operations that torch.onnx.export knows, without branches on values"
        ) from error
    assert program is not None
    model = program.model_proto
    set_model_props(model, {name: str(value) for name, value in part.facts.items()})
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporter's warnings about its own inside, and about missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def compare(part: Part, model: "ModelProto") -> float:
    """Return the largest difference between onnxruntime and PyTorch, for batches of 1 and 5.

    Raises:
        RunError: it is larger than `TOLERANCE`, or onnxruntime refuses the model.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    many = torch.cat([part.example, part.example.flip(0).roll(1, -1)])[:COMPARED]
    difference = 0.0
    for batch in (many, many[:1]):
        with torch.no_grad():
            expected = part.module(batch)
        expected = expected if isinstance(expected, tuple) else (expected,)
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            found = session.run(None, {part.given: batch.cpu().numpy()})
        except Exception as error:  # onnxruntime has a type for each kind
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"{part.name}.onnx fails in onnxruntime for {len(batch)} images ({reason}): "
                "the file is not written"
            ) from error
        for name, theirs, ours in zip(part.results, found, expected, strict=True):
            ours = ours.cpu()
            off = ((torch.from_numpy(theirs) - ours).abs() / ours.abs().clamp_min(1)).max().item()
            if not off <= TOLERANCE:
                raise RunError(
                    f"{name} of {part.name}.onnx differs from PyTorch by {off:.2g} in onnxruntime, "
                    f"and {TOLERANCE:g} is allowed: the file is not written"
                )
            difference = max(difference, off)
    return difference
