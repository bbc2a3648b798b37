"""A trained model in its folder, with all methods that use it.

config.json            every setting, the data and its checksum, versions
checkpoints/           the last two checkpoints, each complete and hashed
codes/                 the training images' posteriors under stage 1
last/                  the state of stage 1 at its end, to continue from
latents.json           mean and scale of these codes, for a diffusion model
mixture/               the mixture prior, fitted to these codes
metrics.jsonl          one line per log entry of both stages
progress.png           samples and reconstructions at each tenth of training
training.png, samples.png, reconstructions.png, summary.json
evaluation.json        the last output of `poise evaluate`
diagnosis.json         the last result of `poise diagnose`
scores/                the scores of training images, for percentiles of `poise score`
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from poise.balance import Balance
from poise.data import Dataset, checked_images
from poise.data.decoding import DEEP, grid, to_picture
from poise.errors import InputError, RunError
from poise.evaluation import AUTO, Evaluation, real_images
from poise.features import Extractor
from poise.flow import Flow
from poise.latent import DiagonalGaussian, LatentScale, latent_scale, spherical_path
from poise.metrics import encode_all, reconstruction
from poise.metrics.encoding import CHUNK, encode_chunks, encoded
from poise.metrics.reference_statistics import ReferenceStatistics
from poise.objectives import is_deterministic
from poise.priors import (
    MixturePrior,
    Prior,
    RenormalisedPrior,
    TrainedModel,
    make_prior,
    renormalisation_factor,
)
from poise.priors.base import LOST_SHARE
from poise.priors.mixture import MOST_LATENTS
from poise.protocols import Protocol
from poise.recipes.settings import Generation, Recipe, from_json
from poise.runs import evaluating, scores, sharing
from poise.runs.build import first_stage, second_stage, stage_balance
from poise.runs.checkpoint import (
    Saved,
    checkpoints,
    fitting,
    hash_of,
    load_weights,
    newest_intact_checkpoint,
    read_codes,
    read_folder,
    write_folder,
)
from poise.runs.classes import class_number, read_labels
from poise.runs.folder import data_settings, read_config, read_data
from poise.runs.log import history, read_log
from poise.runs.plots import training_curves
from poise.sampling import (
    ADJUSTMENT_DRAWS,
    VarianceAdjustment,
    fit_adjustment,
    sample,
    sample_chunks,
)
from poise.shapes import Images, Latents
from poise.support.files import read_json
from poise.support.html import data_uri
from poise.support.kernels import own_kernels
from poise.support.progress import warn
from poise.support.seeds import REFERENCE_SEED, drawn, generator, noise_per_image
from poise.training import under
from poise.training.machine import choose_device
from poise.vae import VAE
from poise.variants import (
    PRIORS,
    SCORE_PROPOSAL,
    SCORE_SAMPLES,
    SCORE_TRAINING_IMAGES,
    PriorName,
    Proposal,
    SecondStage,
    available_priors,
    default_prior,
    find_prior,
)

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image as Picture

TrainedNetwork = TypeVar("TrainedNetwork", bound=VAE | Flow)
MOST_STEPS = 1_000  # of an interpolation
DIAGNOSIS = "diagnosis.json"
MIXTURE: PriorName = "mixture"  # also the folder's name


@dataclass(frozen=True)
class Trained:
    """A trained stage: its network and its balance."""

    vae: VAE
    balance: Balance


@dataclass(frozen=True)
class Diagnosed:
    """The part of diagnosis.json that a run reads."""

    checkpoint: str
    figures: dict[str, Any]


@final
class Run:
    """A trained model and its folder, as `poise.train` and `poise.load` return it.

    Attributes:
        folder: the run's folder.
        recipe: its settings.
        data: the training data: source, shape, number of images, checksum.
        first: stage 1.
        second: stage 2, if it is a VAE, or None.
        flow: stage 2, if it is a flow, or None.
        finished: whether training is complete.
        warnings: messages about damaged checkpoints that were skipped.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        saved: Saved,
        warnings: list[str],
        vae: VAE | None,
    ) -> None:
        self.folder = folder
        self.recipe: Recipe = from_json(
            Recipe, config["recipe"], f"{folder / 'config.json'}: recipe"
        )
        self.data: dict[str, Any] = config["data"]
        self.finished: bool = saved.meta["finished"]
        self.warnings = warnings
        self._dataset: Dataset | None = None
        self._fitted_priors: dict[PriorName, Prior] = {}
        self.first = Trained(
            *self._stage(1, saved, first_stage(self.recipe, self.data["shape"], vae))
        )
        has_second = (
            self.recipe.second is not None and saved.meta["stage"] == 2 and saved.meta["step"] > 0
        )
        self.second: Trained | None = None
        self.flow: Flow | None = None
        if has_second:
            network = second_stage(self.recipe, self.first.vae, len(self.classes))
            if isinstance(network, Flow):
                self.flow, _ = self._stage(2, saved, network)
            else:
                self.second = Trained(*self._stage(2, saved, network))

    def _stage(
        self, number: int, saved: Saved, network: TrainedNetwork
    ) -> tuple[TrainedNetwork, Balance]:
        balance = stage_balance(self.recipe.stages[number - 1], self.recipe, self.data["shape"])
        tensors = under(f"stage{number}", saved.tensors)
        with fitting(self.folder, number):
            load_weights(network, under("average", tensors) or under("vae", tensors))
            load_weights(balance, under("balance", tensors))
        return network.eval(), balance.eval()

    def save_pretrained(
        self, folder: str | Path, *, license: str | None = None, codes: bool = True
    ) -> Path:
        """Write this run to a folder for others, with a model card, and return the folder.

        The folder is a run's folder without the state of the optimizer. `poise.load` and all
        commands take it. It holds safetensors, JSON, text and PNG files.

        Args:
            folder: a new or empty folder.
            license: name of the license for the model card. None: the card says that it is missing.
            codes: include the posteriors of the training images. The decoder turns them into images
                like those of the training set. Without them, renormalised priors, `run.codes` and
                `poise explore` are not available, and pictures that show real images are left out.

        Raises:
            InputError: the run is not finished, or the folder is not empty.
            RunError: the checkpoint or the codes are damaged, or the folder cannot be written.
        """
        return sharing.save_pretrained(self, folder, license=license, codes=codes)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = True,
        license: str | None = None,
        codes: bool = True,
        token: str | None = None,
    ) -> str:
        """Upload this run to the Hugging Face Hub, and return its address.

        `poise.load("hf:OWNER/NAME")` loads it.

        Args:
            name: "OWNER/NAME".
            private: make a new repository private. An existing one keeps its setting.
            license, codes: see `save_pretrained`.
            token: access token. None: that of `hf auth login`.

        Raises:
            InputError: a wrong name, or the run is not finished.
            MissingExtraError: huggingface_hub is not installed.
            RunError: the upload fails.
        """
        return sharing.push_to_hub(
            self, name, private=private, license=license, codes=codes, token=token
        )

    def to(self, device: str | torch.device) -> "Run":
        """Move the networks and balances to a device, and return this run."""
        for stage in filter(None, (self.first, self.second)):
            stage.vae.to(device)
            stage.balance.to(device)
        if self.flow is not None:
            self.flow.to(device)
        return self

    @property
    def levels(self) -> int | None:
        """The value that became white in training. None: the files said it."""
        return self.data.get("levels", DEEP)

    @property
    def deterministic(self) -> bool:
        """Whether stage 1 is a deterministic autoencoder, without KL and likelihood."""
        return is_deterministic(self.recipe.first.objective)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.first.vae.parameters()).device

    @cached_property
    def codes(self) -> DiagonalGaussian:
        """Posteriors of the training images under stage 1, (n, latents).

        Raises:
            RunError: stage 1 is not finished, or the folder is damaged.
        """
        folder = self.folder / "codes"
        if not folder.exists() and self.finished:
            raise RunError(
                f"{self.folder} has no codes: it was shared without those of its training images, "
                "which renormalisation, the variance law and `poise explore` need"
            )
        if not folder.exists():
            raise RunError(
                f"{self.folder} has no codes yet: stage 1 is not finished; "
                "continue with `poise train`"
            )
        return read_codes(folder, self.data["train"], self.recipe.network.latent_dim)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the run learned. Empty: it was trained without labels."""
        return tuple(self.data.get("classes", ()))

    @cached_property
    def labels(self) -> Tensor | None:
        """The class of each training image, (n,), as its position in `classes`.

        None: the run was trained without labels.

        Raises:
            RunError: see `codes`.
        """
        return read_labels(self.folder / "codes", self.data["train"]) if self.classes else None

    @cached_property
    def latent_scale(self) -> LatentScale:
        """Mean and scale of the training images' latents, per channel and over all.

        Raises:
            RunError: see `codes`.
        """
        vectors = tuple(self.codes.mean.shape[1:])
        shape = tuple(getattr(self.first.vae.decoder, "latent_shape", vectors))
        return latent_scale(self.codes, shape if math.prod(shape) == vectors[0] else vectors)

    def checked(self, images: Any) -> Any:
        """Return images in the layout and the range of the network, see `encode`.

        Raises:
            InputError: another shape, or values out of range.
        """
        return checked_images(images, self.data["shape"], self.levels)

    def encode(self, images: Any) -> DiagonalGaussian:
        """Return the posterior of each image, (n, latents), on the CPU.

        Args:
            images: (n, channels, height, width), bytes or float in [0, 1].

        Raises:
            InputError: another shape, or values out of range.
        """
        return encode_all(self.first.vae, self.checked(images))

    def encode_chunks(self, images: Any) -> Iterator[DiagonalGaussian]:
        """Return the posteriors of `encode` as an iterator of chunks that fit into memory.

        Wrong input raises an error at the call, before the first chunk.

        Args:
            images: see `encode`.

        Raises:
            InputError: see `encode`.
        """
        return encode_chunks(self.first.vae, self.checked(images))

    def reconstruct(self, images: Any, *, generation: Generation | None = None) -> Images:
        """Return the reconstruction of each image, float in [0, 1], on the CPU.

        Latents are posterior means, or samples if `generation` says so.

        Args:
            images: see `encode`.
            generation: decode the mean or a sample, adjust the variance or not. None: the recipe's.

        Raises:
            InputError: see `encode`.
        """
        return torch.cat(list(self.reconstruct_chunks(images, generation=generation)))

    def reconstruct_chunks(
        self, images: Any, *, generation: Generation | None = None
    ) -> Iterator[Images]:
        """Yield the images of `reconstruct` in chunks that fit into memory.

        Args:
            images, generation: see `reconstruct`.

        Raises:
            InputError: see `encode`.
        """
        generation = generation or self.recipe.generation
        source = generation.reconstruct_from
        adjust = (
            self._reconstruction_adjustment(source) if generation.adjust_reconstructions else None
        )
        for _, posterior, noise in encoded(
            self.first.vae,
            self.checked(images),
            self.recipe.seed,
        ):
            latents = posterior.sample(noise) if source == "sample" else posterior.mean
            restored = self._decode(latents).clamp(0, 1)  # a network of your own may leave [0, 1]
            yield adjust(restored) if adjust else restored

    def interpolate(self, a: Any, b: Any, steps: int = 16) -> Images:
        """Return images on the path between the codes of two images, on the CPU.

        The codes are posterior means. Their path is an arc about 0 (`latent.spherical_path`),
        because codes are nearly N(0, I). Codes of a deterministic autoencoder have no such law:
        their path is a straight line.

        Args:
            a, b: one image each, (channels, height, width), bytes or float in [0, 1].
            steps: number of images, from 2 to 1,000. The first and the last are reconstructions.

        Returns:
            (steps, channels, height, width), float in [0, 1].

        Raises:
            InputError: wrong `steps`, another shape, or values out of range.
        """
        if not 2 <= steps <= MOST_STEPS:
            raise InputError(f"steps must be from 2 to {MOST_STEPS}, not {steps}")
        ends = [image if isinstance(image, torch.Tensor) else np.asarray(image) for image in (a, b)]
        start, end = (self.encode(image[None]).mean[0] for image in ends)
        path = (
            torch.lerp(start, end, torch.linspace(0, 1, steps)[:, None])
            if self.deterministic
            else spherical_path(start, end, steps)
        )
        return torch.cat([self._decode(part) for part in path.split(CHUNK)]).clamp(0, 1)

    @torch.no_grad()
    def _decode(self, latents: Latents) -> Images:
        """Return the decoded latents, float32 on the CPU."""
        with own_kernels(self.device):
            images = self.first.vae.decode(latents.to(self.device)).float()
        return images.cpu()

    def _reconstruction_adjustment(self, source: str) -> VarianceAdjustment:
        """Fit the adjustment to reconstructions of some training images.

        So the adjusted reconstruction of an image does not depend on the other images of a call.
        """
        rows = drawn(len(self.codes.mean), ADJUSTMENT_DRAWS)
        some = DiagonalGaussian(self.codes.mean[rows], self.codes.logvar[rows])
        noise = noise_per_image(*some.mean.shape, seed=self.recipe.seed)
        latents = some.sample(noise) if source == "sample" else some.mean
        decoded = torch.cat([self._decode(part) for part in latents.split(CHUNK)])
        return fit_adjustment(decoded, self.data["pixel_std"])

    @property
    def second_stage(self) -> SecondStage | None:
        """Kind of the trained stage 2, or None."""
        return "vae" if self.second else "flow" if self.flow else None

    @property
    def available_priors(self) -> tuple[PriorName, ...]:
        """Names of the priors that can be made: no mixture of more than 512 latents."""
        many = self.recipe.network.latent_dim > MOST_LATENTS
        names = available_priors(self.second_stage)
        return tuple(name for name in names if not (many and name == MIXTURE))

    @property
    def default_prior(self) -> PriorName:
        """The prior that `sample` uses if none is given: that of stage 2, else normal."""
        return default_prior(self.second_stage)

    def prior_distances(self) -> dict[str, float] | None:
        """Return the distance between images and samples of each prior, smallest first.

        The distances come from the last `poise diagnose`, which measures none with few images. If
        there is no diagnosis, or if it is older than the newest checkpoint, the result is None. The
        distance is the Frechet distance in pixels, as a fraction of the images' variance.
        """
        try:
            found = read_json(self.folder / DIAGNOSIS, Diagnosed)
        except InputError:
            return None
        if found.checkpoint != self.position:
            return None
        distances = {name: found.figures.get(f"distance_{name}") for name in PRIORS}
        known = {name: d for name, d in distances.items() if isinstance(d, float)}
        return dict(sorted(known.items(), key=lambda item: item[1]))

    @property
    def position(self) -> str:
        """Name of the newest checkpoint in the folder."""
        return max((path.name for path in checkpoints(self.folder / "checkpoints")), default="")

    @property
    def weights(self) -> str:
        """SHA-256 of the newest checkpoint's tensors. Empty: there is none."""
        return hash_of(self.folder / "checkpoints" / self.position) if self.position else ""

    def prior(self, name: PriorName | None = None, generation: Generation | None = None) -> Prior:
        """Return a prior of the latents, with the noise and renormalisation of `generation`.

        Args:
            name: a key of `poise.variants.PRIORS`. None: that of stage 2, else normal.
            generation: None: the recipe's.

        Raises:
            InputError: no such prior, or it needs a second stage that the run does not have.
        """
        generation = generation or self.recipe.generation
        prior = self._plain_prior(name or self.default_prior, generation)
        if generation.renormalise == "never" or (
            generation.renormalise == "when-lost" and not self._lost_much
        ):
            return prior
        released = generation.variance_law == "released"
        factor = renormalisation_factor(prior, self.codes, released=released, device=self.device)
        return RenormalisedPrior(prior, factor)

    def _plain_prior(self, name: PriorName, generation: Generation) -> Prior:
        needed = find_prior(name).second_stage
        if needed not in (None, self.second_stage):
            what = "second VAE" if needed == "vae" else "flow"
            raise InputError(
                f"{self.folder} has no trained {what}: its priors are "
                f"{', '.join(self.available_priors)}"
            )
        if name in self._fitted_priors:
            return self._fitted_priors[name].to(self.device)
        saved = self._saved_mixture() if name == MIXTURE else None
        prior = saved or self._new_prior(name, generation)
        if needed is None:  # the noise of stage 2 and the solver differ between generations
            self._fitted_priors[name] = prior
        return prior.to(self.device)

    def _new_prior(self, name: PriorName, generation: Generation) -> Prior:
        second = self.second
        model = TrainedModel(
            self.recipe.network.latent_dim,
            lambda: self.codes,
            second=second.vae if second else self.flow,
            gamma2=second.balance.gamma2 if second and generation.second_stage_noise else None,
            generation=generation,
            seed=self.recipe.seed,
            device=self.device,
            labels=self.labels if name == MIXTURE else None,
        )
        return make_prior(name, model)

    def save_mixture(self) -> None:
        """Save the mixture prior, so that image i of a seed is the same on all machines.

        Fits of two machines, or of a CPU and a GPU, differ by more than rounding. If no mixture can
        be fitted to the codes, nothing is saved.
        """
        try:
            mixture = self._plain_prior(MIXTURE, self.recipe.generation)
        except InputError:
            return
        meta = {"codes": hash_of(self.folder / "codes"), "seed": self.recipe.seed}
        write_folder(self.folder / MIXTURE, mixture.state_dict(), meta)

    def _saved_mixture(self) -> MixturePrior | None:
        """Return the saved mixture, or None if the run has none for its present codes.

        Runs that were finished before 2026-11-27 have none.
        """
        folder = self.folder / MIXTURE
        if not folder.exists():
            return None
        try:
            saved = read_folder(folder)
            if self.has_codes and saved.meta.get("codes") != hash_of(self.folder / "codes"):
                return None
            return MixturePrior.restored(saved.tensors, self.recipe.network.latent_dim)
        except (InputError, RunError) as error:
            warn(f"{error}; fitting the mixture again")
            return None

    @cached_property
    def _lost_much(self) -> bool:
        """Whether stage 2 lost much variance (the released rule). False without stage 2."""
        if self.second is None:
            return False
        figures = reconstruction(self.second.vae, self.second.balance, self.latents())
        return figures.variance_lost > LOST_SHARE * figures.mse_sampled

    def latents(self) -> Latents:
        """Return one posterior sample per training image, (n, latents).

        Stage 2 learns these latents.
        """
        noise = torch.randn(self.codes.mean.shape, generator=generator("latents", self.recipe.seed))
        return self.codes.sample(noise)

    def sample(
        self,
        count: int,
        *,
        prior: PriorName | None = None,
        seed: int = 0,
        first: int = 0,
        generation: Generation | None = None,
        label: str | int | None = None,
        guidance: float | None = None,
    ) -> Images:
        """Return generated images, float in [0, 1], on the CPU.

        Args:
            count: number of images, at least 1.
            prior: a key of `poise.variants.PRIORS`. None: that of stage 2, else normal.
            seed: image i of a seed does not depend on `count`.
            first: number of the first image.
            generation: noise, renormalisation, adjustment. None: the recipe's.
            label: one of `classes`, by name: images of this class. The prior must be that of a flow
                or the mixture of a run with labels. None: images of all classes, by their
                frequency among the training images.
            guidance: of a flow with labels, at least 0. More than 1: more typical of the class,
                and less diverse. None: that of `generation`.

        Raises:
            InputError: `count` is less than 1, no such prior or class, the prior takes no label, or
                the run lacks the second stage that the prior needs.
        """
        how: dict[str, Any] = {"label": label, "guidance": guidance, "generation": generation}
        return torch.cat(
            list(self.sample_chunks(count, prior=prior, seed=seed, first=first, **how))
        )

    def sample_chunks(
        self,
        count: int,
        *,
        prior: PriorName | None = None,
        seed: int = 0,
        first: int = 0,
        generation: Generation | None = None,
        label: str | int | None = None,
        guidance: float | None = None,
    ) -> Iterator[Images]:
        """Return the images of `sample` as an iterator of chunks that fit into memory.

        Wrong input raises an error at the call, before the first chunk.

        Args:
            count, prior, seed, first, generation, label, guidance: see `sample`.

        Raises:
            InputError: see `sample`.
        """
        if count < 1:
            raise InputError(f"the number of images must be at least 1, not {count}")
        generation = generation or self.recipe.generation
        if guidance is not None:
            generation = replace(generation, guidance=guidance)
            if find_prior(prior or self.default_prior).second_stage != "flow":
                raise InputError("guidance is of the flow: use --prior flow, or leave it out")
        number = None if label is None else class_number(label, self.classes, self.folder)
        source = self.prior(prior, generation)
        # That of all classes, whose spread is the images' own.
        adjust = self._adjustment(source) if generation.adjust_variance else None
        source = source if number is None else source.of_class(number).to(self.device)
        chunks = sample_chunks(self.first.vae, source, count, seed=seed, first=first)
        images = (chunk.clamp(0, 1) for chunk in chunks)  # a network of your own may leave [0, 1]
        return map(adjust, images) if adjust else images

    def _adjustment(self, source: Prior) -> VarianceAdjustment:
        reference = sample(self.first.vae, source, ADJUSTMENT_DRAWS, seed=REFERENCE_SEED)
        return fit_adjustment(reference, self.data["pixel_std"])

    def evaluate(
        self,
        images: Any = None,
        *,
        statistics: ReferenceStatistics | str | Path | None = None,
        protocol: str | Protocol = "default",
        extractor: str | Extractor = AUTO,
        priors: Sequence[PriorName] | None = None,
        count: int | None = None,
        infinity: bool = False,
        nll_samples: int = 0,
        seed: int = 0,
        quiet: bool = True,
    ) -> Evaluation:
        """Return error, likelihood, latent statistics, and distances of samples from real images.

        Reconstructions and the samples of each prior are compared with real images by a protocol.

        Args:
            images: real images (n, channels, height, width), bytes or float in [0, 1]. None: the
                test or training images of the run's data, as the protocol says. They are read again
                from their source and checked by checksum.
            statistics: reference statistics, or a file of them (see `poise.metrics.
                read_statistics`). Samples and reconstructions are compared with them instead of
                with the images; there are as many samples as images behind them, or `count`.
                None: with the images.
            protocol: a name of `poise.protocols.PROTOCOLS`, or a `Protocol`.
            extractor: see `poise.evaluate`, or an extractor from `features.make_extractor`. "none":
                no comparison.
            priors: names of the priors whose samples are compared, if the run has them. None: all
                of `poise.variants.PRIORS`.
            count: number of real images, and of generated ones. None: as the protocol says.
            infinity: also extrapolate Frechet distances to infinitely many images.
            nll_samples: importance samples per image for the log likelihood. 0: do not estimate it.
            seed: seed of the generated images.
            quiet: show no progress.

        Raises:
            InputError: the data cannot be read again or have changed, the given extractor is not
                available, or `nll_samples` is set for a model without a likelihood.
        """
        return evaluating.evaluate_run(
            self,
            images,
            statistics=statistics,
            protocol=protocol,
            extractor=extractor,
            priors=priors,
            count=count,
            infinity=infinity,
            nll_samples=nll_samples,
            seed=seed,
            quiet=quiet,
        )

    def images_for(self, protocol: Protocol) -> Any:
        """Return the real images of a protocol: test or training images of the run's data.

        They are raw, or after JPEG if the protocol says so, whether or not the run was trained on
        JPEGs.

        Args:
            protocol: its reference must be "train" or "test".

        Raises:
            InputError: see `dataset`.
        """
        dataset, own = self.dataset(), self.recipe.data.jpeg_quality
        if own not in (None, protocol.jpeg):  # JPEG loses detail, so read the source again
            self._check_stored()
            settings = data_settings(self.recipe, self.data)
            dataset = read_data(
                replace(settings, jpeg_quality=protocol.jpeg), cache=self.folder / "cache"
            )
        images = dataset.train if protocol.reference == "train" else dataset.test
        return real_images(images, protocol if own is None else replace(protocol, jpeg=None))

    @property
    def has_codes(self) -> bool:
        """Whether the folder holds `codes`, which are there as soon as stage 1 is finished."""
        return (self.folder / "codes").exists()

    def score(
        self,
        images: Any,
        *,
        samples: int = SCORE_SAMPLES,
        training_images: int = SCORE_TRAINING_IMAGES,
        training: Any = None,
        names: Sequence[str] = (),
        seed: int = 0,
        proposal: Proposal = SCORE_PROPOSAL,
        quiet: bool = True,
    ) -> scores.Scores:
        """Return likelihood and reconstruction error of each image, to find the odd ones.

        Both are also given as percentiles of training images. The scores of these take longest, and
        are kept in the run's folder for the next call.

        Args:
            images: see `encode`.
            samples: importance samples per image for the likelihood, at least 1.
            training_images: maximum number of training images behind the percentiles, drawn with a
                fixed seed. 0: no percentiles.
            training: the training images. None: those of the run's data, read again.
            names: of the images, for the table. Default: their numbers.
            seed: seed of the samples. The score of an image depends on its number.
            proposal: "encoder", or "refined", which is accurate for more images and takes about a
                hundred times as long; see `poise.metrics.likelihood`.
            quiet: show no progress.

        Returns:
            One value per image: see `poise.runs.scores.Scores`. A model without a likelihood has
            errors only.

        Raises:
            InputError: see `encode`; a number out of range; the training images cannot be read.

        Example:
            >>> scores = run.score(photos)                                     # doctest: +SKIP
            >>> photos[scores.oddest_first()[:8]]                              # doctest: +SKIP
        """
        return scores.score(
            self,
            images,
            samples=samples,
            training_images=training_images,
            training=training,
            names=names,
            seed=seed,
            proposal=proposal,
            quiet=quiet,
        )

    def test_images(self) -> Any:
        """Return the test images of the run's data, read again.

        Raises:
            InputError: see `dataset`.
        """
        return self.dataset().test

    def remember(self, dataset: Dataset) -> "Run":
        """Return this run after storing its data, so that `dataset` does not read them again."""
        self._dataset = dataset
        return self

    def dataset(self) -> Dataset:
        """Return the run's data, from memory or read again and checked by checksum.

        Raises:
            InputError: the data cannot be read again or have changed, or the run was trained on an
                array.
        """
        if self._dataset is not None:
            return self._dataset
        self._check_stored()
        dataset = read_data(data_settings(self.recipe, self.data), cache=self.folder / "cache")
        if dataset.checksum != self.data["checksum"]:
            rules = (
                ""
                if "levels" in self.data
                else ", or this version reads links, pages or layouts that the earlier one did not"
            )
            raise InputError(
                f"{self.recipe.data.source} is not the data that {self.folder} was trained on: "
                f"its checksum has changed{rules}"
            )
        if dataset.labels and dataset.labels.checksum != self.data.get("labels"):
            raise InputError(
                f"{self.recipe.data.source} has other labels than those that {self.folder} was "
                "trained with"
            )
        return dataset

    def _check_stored(self) -> None:
        if self.data["source"] == "array":
            raise InputError(
                f"{self.folder} was trained on an array, which is not stored: pass the images"
            )

    def grid(
        self,
        count: int = 64,
        *,
        prior: PriorName | None = None,
        seed: int = 0,
        label: str | int | None = None,
    ) -> "Picture":
        """Return a grid of generated images as a `PIL.Image`.

        A notebook shows it, and `.save("grid.png")` writes it.

        Args:
            count, prior, seed, label: see `sample`.
        """
        return to_picture(grid(self.sample(count, prior=prior, seed=seed, label=label)))

    @property
    def history(self) -> "DataFrame":
        """The training log as a pandas DataFrame, one row per entry of both stages.

        The columns are those of metrics.jsonl: stage, step, loss, mse, kl_nats, gamma2, ... Values
        that an entry lacks are NaN. During training it has the entries so far.

        Raises:
            InputError: the log cannot be read.
            MissingExtraError: pandas is not installed.

        Example:
            >>> run.history.query("stage == 1").plot("images_seen", "mse")  # doctest: +SKIP
        """
        return history(self.folder / "metrics.jsonl")

    def plot(self) -> "Picture":
        """Return the training curves as a `PIL.Image`: MSE, KL and gamma2 of each stage.

        Raises:
            InputError: the run has no log yet.
        """
        from PIL import Image

        log = self.folder / "metrics.jsonl"
        if not read_log(log):
            raise InputError(
                f"{self.folder} has no log yet (metrics.jsonl): there is nothing to plot"
            )
        return Image.open(io.BytesIO(training_curves(log)))

    def _repr_html_(self) -> str:
        """Return a summary with samples and training curves, for a notebook."""
        shown = [self.folder / name for name in ("samples.png", "training.png")]
        sources = [data_uri(path.read_bytes()) for path in shown if path.is_file()]
        style = "max-width:48%; vertical-align:top"
        pictures = "".join(f'<img style="{style}" src="{source}">' for source in sources)
        return f"<p>{escape(repr(self))}</p>{pictures}"

    def __repr__(self) -> str:
        state = "" if self.finished else ", not finished"
        return (
            f"Run({str(self.folder)!r}, recipe {self.recipe.name!r}, "
            f"{self.data['train']} training images{state})"
        )


def load(folder: str | Path, *, device: str = "auto", vae: VAE | None = None) -> Run:
    """Return the run in a folder, in evaluation mode.

    The folder is enough to load it, except for a network of your own.

    Args:
        folder: the folder that `poise train --out` or `poise.train(out=...)` wrote, or
            "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION" for a run that `push_to_hub` shared.
        device: "auto", "cpu", "cuda", ...
        vae: the same modules as in `poise.train(vae=...)`. Their weights are overwritten.

    Raises:
        InputError: the folder is not that of a run, or `vae` is missing or not wanted. The Hub's
            model card is damaged.
        MissingInputError: there is no such folder, or it cannot be downloaded.
        RunError: every checkpoint is damaged, or there is none yet.
    """
    shared = str(folder).startswith(sharing.HUB_PREFIX)
    folder = sharing.fetched(str(folder)) if shared else Path(folder)
    config = read_config(folder)
    if (config["recipe"]["network"]["kind"] == "custom") != (vae is not None):
        needed = (
            "was trained with a network of your own: in Python, poise.load(..., vae=...)"
            if vae is None
            else "has its own network: leave vae out"
        )
        raise InputError(f"{folder} {needed}")
    saved, warnings = newest_intact_checkpoint(folder / "checkpoints")
    if saved is None and (folder / "summary.json").exists():
        raise RunError(
            f"{folder} was finished, and its checkpoints are gone: "
            f"put {folder / 'checkpoints'} back from a copy, or train it again with `poise train`"
        )
    if saved is None:
        raise RunError(f"{folder} has no checkpoint yet; continue with `poise train`")
    return Run(folder, config, saved, warnings, vae).to(choose_device(device))
