"""Score images by a trained run, to find the odd ones: likelihood and error of reconstruction.

log p(x) is the importance-weighted estimate of `poise.metrics.likelihood`, with its standard error
and its effective share of samples. The error is the MSE of the reconstruction from the posterior
mean, per dimension. Both also stand as percentiles of the run's training images: an odd image has a
low percentile of log p(x) and a high percentile of the error.

Training images were learned, so a held-out image of the same kind is on average a little less
likely than they are. The percentiles are of a sample of the training images, drawn with a fixed
seed. Its scores are kept in the run's folder `scores/`, because they take longest.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poise.data import gather
from poise.errors import InputError, RunError
from poise.metrics.encoding import posteriors
from poise.metrics.likelihood import NLLPerImage, nll_per_image
from poise.metrics.reconstruction import summed_error
from poise.recipes.settings import check_value
from poise.runs.checkpoint import read_folder, write_folder
from poise.support.files import write_file
from poise.support.progress import warn
from poise.support.seeds import drawn
from poise.variants import Proposal

if TYPE_CHECKING:
    from poise.runs.run import Run

KEPT = "scores"
COLUMNS = (
    "log_likelihood",
    "standard_error",
    "effective_share",
    "mse",
    "log_likelihood_percentile",
    "mse_percentile",
)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of images, float64 on the CPU, one value per image.

    Attributes:
        names: of the images, as `poise.data.find_images` gives them, or their numbers.
        mse: squared error of the reconstruction from the posterior mean, mean per dimension.
        log_likelihood: estimate of log p(x), in nats, for values in [0, 1]. None for a model
            without a likelihood, as are the next two.
        standard_error: of `log_likelihood`, in nats.
        effective_share: effective sample size over the number of samples, from 1/K to 1. If it is
            low, use more samples.
        log_likelihood_percentile, mse_percentile: percentage of training images with a lower value;
            equal values count half. None: not compared with training images.
        training_images: number of training images behind the percentiles.
    """

    names: tuple[str, ...]
    mse: Tensor
    log_likelihood: Tensor | None
    standard_error: Tensor | None
    effective_share: Tensor | None
    log_likelihood_percentile: Tensor | None = None
    mse_percentile: Tensor | None = None
    training_images: int = 0

    def __len__(self) -> int:
        return len(self.mse)

    def among(self, training: "Scores") -> "Scores":
        """Return these scores with their percentiles among those of training images."""
        likelihoods = self.log_likelihood, training.log_likelihood
        return replace(
            self,
            log_likelihood_percentile=None
            if likelihoods[0] is None or likelihoods[1] is None
            else percentiles(likelihoods[0], likelihoods[1]),
            mse_percentile=percentiles(self.mse, training.mse),
            training_images=len(training),
        )

    def oddest_first(self) -> list[int]:
        """Return the positions of the images, the least likely first (the largest error first)."""
        values = self.mse if self.log_likelihood is None else -self.log_likelihood
        return values.argsort(descending=True, stable=True).tolist()

    def to_csv(self) -> str:
        """Return a table with a row for each image and a column for each score that is known."""
        known = [name for name in COLUMNS if getattr(self, name) is not None]
        values = [getattr(self, name).tolist() for name in known]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *known])
        for name, *row in zip(self.names, *values, strict=True):
            writer.writerow([name, *(f"{value:.7g}" for value in row)])
        return text.getvalue()


def percentiles(values: Tensor, among: Tensor) -> Tensor:
    """Return the percentage of `among` below each value, where equal values count half."""
    ordered = among.sort().values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return 50 * (below + up_to).double() / len(among)


def score(
    run: "Run",
    images: Any,
    *,
    samples: int,
    training_images: int,
    training: Any,
    names: Sequence[str],
    seed: int,
    proposal: Proposal,
    quiet: bool,
) -> Scores:
    """Return the scores of images under a run: see `Run.score`."""
    samples, seed = check_value("samples", int, samples), check_value("seed", int, seed)
    training_images = check_value("training_images", int, training_images)
    if samples < 1 or training_images < 0:
        raise InputError(
            f"samples must be at least 1 and training_images at least 0, "
            f"not {samples} and {training_images}"
        )
    images = run.checked(images)
    if names and len(names) != len(images):
        raise InputError(f"{len(names)} names for {len(images)} images: give one for each")
    how: dict[str, Any] = {"samples": samples, "seed": seed, "proposal": proposal, "quiet": quiet}
    if training_images == 0:
        return measured(run, images, names, **how)
    reference = _of_training(run, training, training_images, **how)
    return measured(run, images, names, **how).among(reference)


def measured(
    run: "Run",
    images: Any,
    names: Sequence[str],
    *,
    samples: int,
    seed: int,
    proposal: Proposal,
    quiet: bool,
) -> Scores:
    """Return the scores of images without percentiles."""
    vae, balance = run.first.vae, run.first.balance
    errors = []
    for batch, posterior in posteriors(vae, images):
        with torch.no_grad():
            difference = vae.decode(posterior.mean).float() - batch
        errors.append(summed_error(difference, 2).cpu() / math.prod(images.shape[1:]))
    likelihood = None
    if not run.deterministic and balance.error.is_likelihood:
        likelihood = nll_per_image(
            vae, balance, images, samples=samples, seed=seed, proposal=proposal, quiet=quiet
        )
    return _scores(names or [str(row) for row in range(len(images))], torch.cat(errors), likelihood)


def _scores(names: Sequence[str], mse: Tensor, nll: NLLPerImage | None) -> Scores:
    if nll is None:
        return Scores(tuple(names), mse, None, None, None)
    likelihood = -nll.nll_nats
    return Scores(tuple(names), mse, likelihood, nll.standard_error_nats, nll.effective_share)


def _of_training(
    run: "Run",
    training: Any,
    number: int,
    *,
    samples: int,
    seed: int,
    proposal: Proposal,
    quiet: bool,
) -> Scores:
    """Return the scores of a sample of the training images, from the run's folder if possible.

    Args:
        run: the run.
        training: the training images. None: those of the run, read again.
        number: of images, at most.
        samples, seed, proposal, quiet: see `Run.score`.
    """
    how = {"weights": run.weights, "samples": samples, "seed": seed, "proposal": proposal}
    how["images"] = min(number, run.data["train"])
    own = training is None
    kept = _kept(run.folder / KEPT, how) if own else None
    if kept is not None:
        return kept
    if training is None:
        try:
            training = run.dataset().train
        except InputError as error:
            raise InputError(
                f"{error}; or leave the percentiles out (--training-images 0, training_images=0)"
            ) from None
        chosen = gather(training, drawn(len(training), number))
    else:
        given = run.checked(training)
        chosen = gather(given, drawn(len(given), number))
    found = measured(run, chosen, (), samples=samples, seed=seed, proposal=proposal, quiet=quiet)
    if own and how["images"] == len(chosen):
        tensors = {name: getattr(found, name) for name in COLUMNS}
        known = {name: value for name, value in tensors.items() if value is not None}
        try:
            write_folder(run.folder / KEPT, known, how)
        except RunError as error:  # they are computed again the next time
            warn(str(error))
    return found


def _kept(folder: Path, how: dict[str, Any]) -> Scores | None:
    if not folder.exists():
        return None
    try:
        saved = read_folder(folder)
    except RunError as error:
        warn(f"{error}; computing the scores of training images again")
        return None
    if saved.meta != how or "mse" not in saved.tensors:
        return None
    likelihood, error, share = (saved.tensors.get(name) for name in COLUMNS[:3])
    return Scores((), saved.tensors["mse"], likelihood, error, share)


def write_csv(scores: Scores, out: Path) -> None:
    """Write scores as a table of comma-separated values.

    Raises:
        RunError: the disk is full or not writable.
    """
    write_file(out, scores.to_csv().encode("utf-8", "backslashreplace"))
