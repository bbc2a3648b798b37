"""Callbacks: your own code at fixed places of a training. TensorBoard and W&B are two of them.

    class Watcher(poise.Callback):
        def on_log(self, entry):
            if entry["stage"] == 1 and entry["mse"] < 0.01:
                raise poise.StopStage

    poise.train("digits", callbacks=[Watcher()])

All methods are optional. Of several processes, the first alone calls them.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from poise.data.decoding import grid, to_bytes
from poise.errors import InputError, MissingExtraError, RunError
from poise.recipes.settings import Recipe, to_json
from poise.shapes import Images
from poise.support.files import read_regular, write_file
from poise.support.progress import warn
from poise.training import distributed


class StopStage(Exception):
    """Raise this in `on_log` or `on_samples` to end the present stage with this step.

    Training goes on with what comes next: codes, stage 2, pictures. The run ends as a finished run.
    """


class Callback:
    """Base of callbacks. Each method does nothing unless a subclass overrides it.

    A method must not change the networks. If it raises an error, the state is saved, and training
    stops with a `RunError` in one line. The same call of `poise.train` then goes on from there.
    """

    def on_start(self, folder: Path, recipe: Recipe, stage: int, step: int) -> None:
        """Called before the first step, also when training resumes.

        Args:
            folder: the run's folder.
            recipe: its settings.
            stage, step: where training begins. Later log entries of an interrupted training are
                dropped and will come again.
        """

    def on_log(self, entry: dict[str, float]) -> None:
        """Called with each entry of metrics.jsonl, about 400 times in a stage.

        Args:
            entry: "stage", "step", "images_seen", "epoch", "loss", "learning_rate", ...
        """

    def on_samples(self, stage: int, step: int, images: Images) -> None:
        """Called with samples of the prior at each tenth of a stage.

        Args:
            stage, step: the stage and the number of its steps.
            images: (8, channels, height, width) in stage 1, 16 images in stage 2, float in [0, 1].
                They are those of progress.png: the same noise each time.
        """

    def on_stage_end(self, stage: int, step: int, network: nn.Module) -> None:
        """Called after a stage is finished and saved.

        Args:
            stage, step: the stage and the number of its steps.
            network: the trained network, with averaged or best weights if the run keeps them: a
                `poise.VAE`, or in stage 2 perhaps a `poise.flow.Flow`.
        """

    def on_end(self) -> None:
        """Called at the end of training, finished or not. An error here is only a warning."""


class TensorBoard(Callback):
    """Write every log entry and samples to TensorBoard files, in a folder for each stage.

    Args:
        folder: where to write. None: tensorboard/ in the run's folder.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if find_spec("tensorboard") is None:
            raise MissingExtraError("TensorBoard", "track")
        self._folder = folder
        self._boards: dict[int, Any] = {}

    def on_start(self, folder: Path, recipe: Recipe, stage: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # In the resumed stage, steps after the checkpoint are purged. If stage 1 is continued,
        # those of the earlier stage 2 are purged, too.
        purged = {number: step + 1 if number == stage else None for number in (1, 2)}
        purged[2] = 0 if (stage, step > 0) == (1, True) else purged[2]
        place = Path(self._folder or folder / "tensorboard")
        self._boards = {
            number: SummaryWriter(str(place / f"stage{number}"), purge_step=first)
            for number, first in purged.items()
        }

    def on_log(self, entry: dict[str, float]) -> None:
        for name in set(entry) - {"stage", "step"}:
            self._boards[int(entry["stage"])].add_scalar(name, entry[name], int(entry["step"]))

    def on_samples(self, stage: int, step: int, images: Images) -> None:
        shown = grid(to_bytes(finite(images)), columns=8)
        self._boards[stage].add_image("samples", shown, step, dataformats="HWC")

    def on_end(self) -> None:
        for board in self._boards.values():
            board.close()


class WandB(Callback):
    """Log entries and samples to Weights & Biases.

    A run that resumes goes on in the same W&B run. Its name is in wandb/poise-id of the run's
    folder. Steps after the checkpoint come twice. Plot against "stage1/step" or "stage2/step".

    Args:
        project: the project of W&B.
        settings: further arguments of `wandb.init`, such as `entity` or `mode="offline"`.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, project: str = "poise", **settings: Any) -> None:
        if find_spec("wandb") is None:
            raise MissingExtraError("W&B", "wandb")
        self._settings = {"project": project, "resume": "allow"} | settings
        self._run: Any = None

    def on_start(self, folder: Path, recipe: Recipe, stage: int, step: int) -> None:
        own = {"id": _wandb_id(folder), "name": folder.name, "dir": str(folder)}
        self._run = import_module("wandb").init(config=to_json(recipe), **(own | self._settings))
        for number in (1, 2):
            self._run.define_metric(f"stage{number}/*", step_metric=f"stage{number}/step")

    def on_log(self, entry: dict[str, float]) -> None:
        stage = int(entry["stage"])
        self._run.log({f"stage{stage}/{key}": value for key, value in entry.items()})

    def on_samples(self, stage: int, step: int, images: Images) -> None:
        image_of = import_module("wandb").Image
        pixels = to_bytes(finite(images)).permute(0, 2, 3, 1)
        shown = [image_of(one.squeeze(2).numpy()) for one in pixels]
        self._run.log({f"stage{stage}/samples": shown, f"stage{stage}/step": step})

    def on_end(self) -> None:
        if self._run is not None:
            self._run.finish()


def finite(images: Images) -> Images:
    """Return images with black in place of values that are NaN."""
    return images.nan_to_num(nan=0.0)


def _wandb_id(folder: Path) -> str:
    """Return the name of a folder's W&B run. It is written at the first call."""
    path = folder / "wandb" / "poise-id"
    if path.exists() and re.fullmatch(r"[0-9a-f]{16}", name := read_regular(path).decode()):
        return name
    path.parent.mkdir(exist_ok=True)
    name = secrets.token_hex(8)
    write_file(path, name.encode())
    return name


class Callbacks:
    """The callbacks of a run.

    Args:
        callbacks: the user's, in the order in which they are called.
        own: those of the options, called before.

    Attributes:
        stopped: whether one of them has raised `StopStage` in the present stage.

    Raises:
        InputError: one of them is not a `Callback`.
    """

    def __init__(self, callbacks: Sequence[Callback], own: Sequence[Callback] = ()) -> None:
        given = callbacks if isinstance(callbacks, Sequence) else (callbacks, None)
        wrong = [callback for callback in given if not isinstance(callback, Callback)]
        if wrong:
            raise InputError(
                "callbacks must be a list of objects of classes derived from poise.Callback, "
                f"not {callbacks!r}"
            )
        self._callbacks, self.stopped = (*own, *callbacks), False

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def call(self, name: str, *values: Any, save: Callable[[], str] | None = None) -> None:
        """Call a method of all callbacks, on rank 0.

        Args:
            name, values: the method and its arguments.
            save: saves the state and returns where it is, called if a method raises an error. None:
                nothing is to be saved.

        Raises:
            RunError: a method raised an error.
        """
        if distributed.rank() > 0:
            return
        for callback in self._callbacks:
            try:
                getattr(callback, name)(*values)
            except StopStage:
                self.stopped = True
            except Exception as error:
                what = f"{type(callback).__name__}.{name} raised {type(error).__name__}"
                text = " ".join(str(error).split())
                what += f" ({text})" if text else ""
                if name == "on_end":
                    warn(what)
                    continue
                place = save() if save else "nothing is lost"
                once = "; it is not called again for this stage" * (name == "on_stage_end")
                raise RunError(
                    f"callback {what}; {place}: mend the callback and run the same command to go "
                    f"on{once}"
                ) from error

    def ends(self) -> bool:
        """Return whether the present stage is to end; the same on all ranks."""
        return bool(self) and distributed.on_first(lambda: self.stopped)
