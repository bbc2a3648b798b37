"""`poise score`: likelihood and reconstruction error of each image, to find the odd ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from poise.cli.images import images_for
from poise.cli.options import Device, Images, ReadingGroup, ReadingOptions, RunFolder
from poise.cli.showing import load_run, print_notes
from poise.errors import InputError
from poise.variants import SCORE_PROPOSAL, SCORE_SAMPLES, SCORE_TRAINING_IMAGES, Proposal

if TYPE_CHECKING:
    from poise.runs.scores import Scores

SHOWN = 5  # of the oddest images
LOW_SHARE = 0.05


@dataclass(frozen=True)
class Score:
    """Write how likely each image is under a run, and how well it is reconstructed.

    The table has a row for each image: its name; an importance-weighted estimate of log p(x), in
    nats, with its standard error and the effective share of its samples; the MSE of its
    reconstruction; and both as percentiles of the training images. An odd image has a low
    percentile of log p(x) and a high percentile of the error.
    """

    run_folder: RunFolder
    images: Images = None
    out: Annotated[Path, arg(help="a .csv file")] = Path("scores.csv")
    samples: Annotated[int, arg(help="importance samples of each image for its likelihood")] = (
        SCORE_SAMPLES
    )
    training_images: Annotated[
        int,
        arg(
            help="maximum number of training images behind the percentiles. Their scores are kept "
            "in the run's folder. 0: no percentiles"
        ),
    ] = SCORE_TRAINING_IMAGES
    proposal: Annotated[
        Proposal,
        arg(
            help="where the samples are drawn. encoder: the posterior of the encoder. refined: a "
            "distribution that is fitted to each image, which is accurate for more images and "
            "takes about a hundred times as long"
        ),
    ] = SCORE_PROPOSAL
    seed: Annotated[int, arg(help="seed of the samples")] = 0
    device: Device = "auto"
    reading: ReadingGroup = field(default_factory=ReadingOptions)

    def run(self) -> None:
        if self.out.suffix != ".csv":
            raise InputError(f"{self.out}: give a .csv file")
        run = load_run(self.run_folder, self.device)
        from poise.runs.scores import write_csv

        given = images_for(run, self.images, self.reading)
        scores = run.score(
            given.images,
            samples=self.samples,
            training_images=self.training_images,
            names=given.names,
            seed=self.seed,
            proposal=self.proposal,
            quiet=False,
        )
        write_csv(scores, self.out)
        print(f"{len(scores)} image{'s' * (len(scores) != 1)}: {self.out}")
        self._print_oddest(scores, run.recipe.network.latent_dim)
        print_notes(given.notes)

    def _print_oddest(self, scores: "Scores", latents: int) -> None:
        from poise.metrics.likelihood import MOST_LATENTS, no_refined

        likelihood, percentile = scores.log_likelihood, scores.log_likelihood_percentile
        if likelihood is None:
            print("note: this model has no likelihood: the oddest have the largest error")
        for row in scores.oddest_first()[:SHOWN]:
            if likelihood is None:
                value, percentile = f"MSE {scores.mse[row]:.5f}", scores.mse_percentile
            else:
                value = f"log p(x) {likelihood[row]:.1f} nats"
            place = "" if percentile is None else f", percentile {percentile[row]:.1f}"
            print(f"{scores.names[row]}: {value}{place}")
        if scores.training_images:
            print(f"note: percentiles are of {scores.training_images:,} training images")
        share = scores.effective_share
        # One sample that outweighs all others has the share 1 / samples.
        if share is not None and float(share.mean()) < max(LOW_SHARE, 2 / self.samples):
            better = latents <= MOST_LATENTS and self.proposal != "refined"
            print(
                f"note: the effective share of samples is {float(share.mean()):.2f}, so log p(x) "
                "is a lower bound with an error; more --samples make it smaller"
                + (", and so does --proposal refined" if better else "")
            )
        if likelihood is not None and self.proposal == "refined" and latents > MOST_LATENTS:
            print(f"note: {no_refined(latents)}")
