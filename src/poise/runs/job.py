"""Train the stages of a prepared run: images -> stage 1 -> codes -> stage 2.

Only rank 0 writes files: checkpoints, the codes, the log and the picture of progress.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.balance import Balance
from poise.data import Dataset, gather
from poise.errors import Interrupted, RunError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.metrics import encode_all
from poise.priors import TrainedModel, make_prior
from poise.recipes.settings import Recipe, Stage
from poise.runs.callbacks import Callbacks
from poise.runs.checkpoint import Saved, fitting, read_code_tensors, save_checkpoint, write_folder
from poise.runs.continuing import LAST
from poise.runs.folder import read_config
from poise.runs.growth import COLUMNS, FLOW_STEPS, ProgressPicture
from poise.runs.log import Log
from poise.runs.options import Options
from poise.runs.validation import Validation
from poise.shapes import Images
from poise.support.files import write_json
from poise.support.progress import warn
from poise.support.seeds import drawn
from poise.training import (
    Batches,
    CodeBatches,
    Engine,
    ImageBatches,
    TrainingState,
    Watch,
    check_weights,
    distributed,
    fit,
    new_state,
    restore_state,
    state_tensors,
    under,
)
from poise.vae import VAE, latents_of
from poise.variants import default_prior, find_prior

BEGINNING: dict[str, Any] = {"stage": 1, "step": 0, "seconds": 0.0, "finished": False}
KEPT_META = ("continued", "validation")  # plain values that later checkpoints keep


class Job:
    """Train both stages of a run, from the position where it stopped.

    Args:
        folder, recipe, config, dataset: of the run.
        stages: network and balance of each stage.
        options: options, with the device of this process.
        saved: checkpoint to resume from, or None.
        threads: number of CPU threads. None: see `poise.training.usual_threads`.
        callbacks: the user's.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        config: dict[str, Any],
        dataset: Dataset,
        stages: list[tuple[VAE | Flow, Balance]],
        options: Options,
        saved: Saved | None,
        threads: int | None,
        callbacks: Callbacks,
    ) -> None:
        self.threads, self.callbacks = threads, callbacks
        self.folder, self.recipe, self.config, self.dataset = folder, recipe, config, dataset
        self.stages, self.options, self.device = stages, options, torch.device(options.device)
        saved = saved or Saved({}, BEGINNING)
        self.tensors: dict[str, Tensor] = saved.tensors
        self.meta: dict[str, Any] = saved.meta
        if start := under("start", self.tensors):
            with fitting(folder, 2):
                stages[1][0].load_state_dict(start)
        self.seconds: float = self.meta["seconds"]
        self._began = time.monotonic()
        self._write_log: Callable[[dict[str, float]], None] = lambda entry: None
        self._states: list[TrainingState[Any]] = []
        self._validation: Validation | None = None
        self._due: list[tuple[Any, ...]] = []  # calls of callbacks, once log and picture are done
        self._picture: ProgressPicture | None = None

    def run_stages(self, stop: Callable[[], bool]) -> None:
        """Train the rest of stage 1 and stage 2.

        Args:
            stop: training stops when it returns True.

        Raises:
            Interrupted: `stop` returned True. The state is saved.
        """
        with ExitStack() as files:
            place = self.meta["stage"], self.meta["step"]
            if distributed.rank() == 0:
                log = Log(self.folder, *place)
                self._write_log = files.enter_context(closing(log)).write
                self._use_engine(self.config["engine"])
                self._picture = self._begin_picture()
            files.callback(self.callbacks.call, "on_end")
            self.callbacks.call("on_start", self.folder, self.recipe, *place)
            images = ImageBatches(self.dataset.train, self.device, flips=self.recipe.data.flips)
            first = self._stage(1, images, stop)
            codes, mirrored = self._codes(first)
            if place[0] == 1:
                self.callbacks.call("on_stage_end", 1, first.step, first.trained)
            if self.recipe.second is not None:
                network = self.stages[1][0]
                labels = self._labels
                if isinstance(network, Flow):
                    network.set_statistics(codes, labels)
                else:
                    labels = None
                data = CodeBatches(
                    codes.mean, codes.logvar, self.device, mirrored=mirrored, labels=labels
                )
                second = self._stage(2, data, stop)
                self._keep(2, second, over=True)
                self._write(stage=2, step=second.step, finished=True)
                self.callbacks.call("on_stage_end", 2, second.step, second.trained)

    @property
    def _labels(self) -> Tensor | None:
        """The class of each training image, (n,)."""
        labels = self.dataset.labels
        return None if labels is None else torch.from_numpy(labels.train)

    def _stage(self, number: int, data: Batches, stop: Callable[[], bool]) -> TrainingState[Any]:
        stage, (network, balance) = self.recipe.stages[number - 1], self.stages[number - 1]
        state: TrainingState[Any] = new_state(network, balance, stage, self.device)
        self._states.append(state)
        mine = under(f"stage{number}", self.tensors)
        if "step" in mine:
            with fitting(self.folder, number):
                restore_state(state, mine)
        if self.meta["stage"] > number:
            return state
        validation = self._begin_validation(stage, mine) if number == 1 else None
        if validation is not None and validation.ends():  # an error stopped it in this very step
            return state
        self.callbacks.stopped = False
        fell_back = self._use_eager_steps if self.options.engine == "auto" else None
        watch = Watch(
            self._log,
            lambda s: self._save(number, s),
            stop,
            fell_back,
            self.options.save_seconds,
            self.options.quiet,
            lambda s, tenth: self._show(number, s, tenth),
            validation.measure if validation else lambda s: {},
            lambda: self._ends(number, state, validation),
        )
        how: dict[str, Any] = {
            "number": number,
            "seed": self.recipe.seed,
            "engine": self.config["engine"],
        }
        if not fit(state, data, stage, watch=watch, threads=self.threads, **how):
            # Wait until rank 0 has saved: torchrun kills it if another process ends first.
            distributed.wait()
            raise Interrupted(
                f"stopped at step {state.step} of stage {number}, and saved: "
                "run the same command to go on"
            )
        return state

    def _begin_validation(self, stage: Stage, saved: dict[str, Tensor]) -> Validation | None:
        if self.recipe.data.validation is not None:
            best = under("best", saved)
            self._validation = Validation(self.dataset, stage, self.recipe.seed, best)
        return self._validation

    def _log(self, entry: dict[str, float]) -> None:
        self._write_log(entry)
        self._due.append(("on_log", entry))

    def _ends(self, number: int, state: TrainingState, validation: Validation | None) -> bool:
        due, self._due = self._due, []
        for name, *values in due:
            self._call(name, *values, number=number, state=state)
        return self.callbacks.ends() or (validation is not None and validation.ends())

    def _call(self, name: str, *values: Any, number: int, state: TrainingState) -> None:
        """Call the callbacks; if one raises an error, save the state first."""

        def save() -> str:
            self._save(number, state)
            return f"the run is saved at step {state.step} of stage {number}"

        self.callbacks.call(name, *values, save=save)

    def _begin_picture(self) -> ProgressPicture:
        number, step = self.meta["stage"], self.meta["step"]
        steps = self.recipe.stages[number - 1].total_steps(len(self.dataset.train))
        began = [entry["step"] for entry in self.config.get("continued", [])[-1:]]
        whole = self.recipe.first.total_steps(len(self.dataset.train))
        names = [default_prior(kind) for kind in (None, self.recipe.second_stage)]
        return ProgressPicture(
            self.folder / "progress.png",
            gather(self.dataset.test, drawn(len(self.dataset.test), COLUMNS)),
            seed=self.recipe.seed,
            priors=[find_prior(name).words for name in names[: len(self.stages)]],
            shown=(number, 10 * step // steps) if step or number > 1 else None,
            skipped=10 * began[0] // whole if began else 0,
        )

    def _show(self, number: int, state: TrainingState[Any], tenth: int) -> None:
        """Add a row to the picture: samples from the prior of this stage."""
        if self._picture is None:  # of rank 0 only
            return
        kind = self.recipe.second_stage if number == 2 else None
        first, generation = self._states[0].trained, self.recipe.generation
        model = TrainedModel(
            self.recipe.network.latent_dim,
            lambda: encode_all(first, self.dataset.train),
            second=state.trained if kind else None,
            gamma2=state.balance.gamma2 if kind and generation.second_stage_noise else None,
            generation=replace(generation, flow_steps=min(generation.flow_steps, FLOW_STEPS)),
            device=self.device,
        )
        prior = make_prior(default_prior(kind), model)
        samples = self._picture.add(number, tenth, first, prior)
        if self.callbacks:
            shown = samples.float().clamp(0, 1).cpu()
            self._due.append(("on_samples", number, state.step, shown))

    def _use_eager_steps(self, reason: str) -> None:
        warn(f"steps cannot be recorded as a CUDA graph ({reason}); taking them one by one")
        self._use_engine("eager")

    def _use_engine(self, engine: Engine) -> None:
        """Use an engine from the next step on, and write its name to config.json."""
        self.config["engine"] = engine
        written = read_config(self.folder)
        if written.get("engine") != engine:
            write_json(self.folder / "config.json", written | {"engine": engine})

    def _codes(self, first: TrainingState[VAE]) -> tuple[DiagonalGaussian, DiagonalGaussian | None]:
        """Return the posteriors of the training images, and mark stage 1 as finished.

        The posteriors are read from the folder if they are there. The second value are those of the
        mirrored images, if the run trains on them.

        If images are held out, the best weights of stage 1 replace the last ones.
        """
        validated = None
        if self.meta["stage"] == 1:
            distributed.on_first(lambda: self._keep_last(first))
            if self._validation is not None:
                validated = self._validation.outcome(first)
                self._validation.restore(first)
        codes = distributed.on_first(
            lambda: self._read_codes() or self._compute_codes(first.trained)
        )
        if self.meta["stage"] == 1:
            latents = latents_of(first.trained)
            if latents is not None:  # rank 0 has set the map
                latents.load_state_dict(distributed.on_first(latents.state_dict))
            self._keep(1, first, over=True)
            self.meta = self.meta | {"validation": validated}
            self._write(stage=2, step=0, finished=self.recipe.second is None)
        plain = DiagonalGaussian(codes["mean"], codes["logvar"])
        if not self.recipe.data.flips:
            return plain, None
        return plain, DiagonalGaussian(codes["mirrored_mean"], codes["mirrored_logvar"])

    def _read_codes(self) -> dict[str, Tensor] | None:
        if self.meta["stage"] == 1:
            return None
        try:
            return read_code_tensors(
                self.folder / "codes",
                len(self.dataset.train),
                self.recipe.network.latent_dim,
                mirrored=self.recipe.data.flips,
            )
        except RunError as error:
            warn(f"{error}; computing the codes again")
            return None

    def _compute_codes(self, vae: VAE) -> dict[str, Tensor]:
        codes = encode_all(vae, self.dataset.train)
        latents = latents_of(vae)
        if latents is not None and self.meta["stage"] == 1:
            codes = latents.fit(codes)
        tensors = {"mean": codes.mean, "logvar": codes.logvar}
        if self.recipe.data.flips:
            encoder = nn.Sequential(Mirror(), vae.encoder)
            codes = encode_all(VAE(encoder, vae.decoder), self.dataset.train)
            tensors |= {"mirrored_mean": codes.mean, "mirrored_logvar": codes.logvar}
        labels = {} if self._labels is None else {"labels": self._labels}
        write_folder(self.folder / "codes", tensors | labels, {"images": len(codes.mean)})
        return tensors

    def _keep_last(self, first: TrainingState[VAE]) -> None:
        """Write the state at the end of stage 1, from which a longer training goes on."""
        write_folder(self.folder / LAST, self._all_tensors(1, first), {"step": first.step})

    def _all_tensors(self, number: int, state: TrainingState) -> dict[str, Tensor]:
        tensors = state_tensors(state)
        if number == 1 and self._validation is not None:
            best = self._validation.tensors()
            tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        return tensors

    def _keep(self, number: int, state: TrainingState, *, over: bool = False) -> None:
        """Replace the kept tensors of a stage by its present state.

        If the stage is over, the state of the optimizer and earlier weights are dropped.

        Raises:
            RunError: a weight is not finite.
        """
        check_weights(state, self.recipe.stages[number - 1], number)
        mine = {
            name: tensor
            for name, tensor in self._all_tensors(number, state).items()
            if not (over and name.startswith(("optimizer.", "best.")))
        }
        others = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(f"stage{number}.")
        }
        self.tensors = others | {f"stage{number}.{name}": tensor for name, tensor in mine.items()}

    def _save(self, number: int, state: TrainingState) -> None:
        self._keep(number, state)
        self._write(stage=number, step=state.step, finished=False)

    def _write(self, *, stage: int, step: int, finished: bool) -> None:
        seconds = self.seconds + time.monotonic() - self._began
        kept = {name: self.meta[name] for name in KEPT_META if self.meta.get(name)}
        self.meta = {"stage": stage, "step": step, "seconds": seconds, "finished": finished} | kept
        before = self.recipe.first.total_steps(len(self.dataset.train)) if stage == 2 else 0
        if self._picture is not None:
            self._picture.write()  # a checkpoint has all rows up to its step
        if distributed.rank() == 0:
            save_checkpoint(self.folder / "checkpoints", before + step, self.tensors, self.meta)


class Mirror(nn.Module):
    """Mirror images left to right."""

    def forward(self, images: Images) -> Images:
        return images.flip(3)
