"""Continue a finished run for longer: `--more-epochs`, `--more-minutes`.

The run becomes one of a greater length. Let stage 1 have ended after n of its steps, and let N > n
be its new length. The steps n, n + 1, ..., N - 1 are those of a run that had the length N from the
beginning: the same order of images, the same noise, the same learning rates, the moments of Adam
kept. Stage 2 is then trained anew, on the new codes, for its new length.

So the result is that of a run of length N, to the last bit on the same machine, if that run has the
same learning rates in its first n steps. A constant learning rate does. Rates that fall at
fractions of the length do not: the longer run still has the full rate where the shorter one had
halved it. config.json counts these steps (`other_rates`), and the rate rises again where training
goes on.

A continuation begins in this order, so that a kill at any moment loses nothing: config.json gets
the new lengths; what belongs to the old weights is deleted; a checkpoint at step n is written; the
checkpoints of the shorter run are deleted. A checkpoint knows how often its run was continued. If
that is less than config.json says, the last three steps are taken again.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from poise.errors import InputError, RunError
from poise.recipes.settings import Recipe, Stage, check_value, from_json
from poise.runs.checkpoint import (
    Saved,
    checkpoints,
    read_folder,
    save_checkpoint,
)
from poise.runs.folder import read_config
from poise.support.files import remove
from poise.training import under

LAST = "last"  # folder of the state of stage 1 at its end
OF_OLD_WEIGHTS = (
    *("summary.json", "evaluation.json", "diagnosis.json", "latents.json", "progress.png"),
    *("codes", "mixture"),
)


@dataclass(frozen=True)
class More:
    """Length of a continuation, in epochs or in minutes. One of the two is given.

    Attributes:
        epochs: passes over the training images that stage 1 is longer.
        minutes: time for the rest of stage 1, all of stage 2, codes and pictures.
    """

    epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name, hint in {"epochs": int | None, "minutes": float | None}.items():
            plain = check_value(f"more_{name}", hint, getattr(self, name))
            object.__setattr__(self, name, plain)  # the dataclass is frozen
        if (self.epochs is None) == (self.minutes is None):
            raise InputError("give either more_epochs or more_minutes")
        for name in ("epochs", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise InputError(f"more_{name} must be greater than 0 and finite, not {value}")

    def __str__(self) -> str:
        return (
            f"more_minutes={self.minutes:g}"
            if self.epochs is None
            else f"more_epochs={self.epochs}"
        )


def settings_of(folder: Path | None, changes: dict[str, Any]) -> Recipe:
    """Return the recipe of the run that is to be continued.

    Args:
        folder: its folder.
        changes: settings that the user gave.

    Raises:
        InputError: no folder is given, it holds no run, or settings are given.
    """
    if folder is None:
        raise InputError("more_epochs and more_minutes continue a finished run: give its folder")
    given = [name for name, value in changes.items() if value is not None]
    if given:
        raise InputError(
            f"{folder} is continued with its own settings: leave out {', '.join(sorted(given))}"
        )
    return from_json(Recipe, read_config(folder)["recipe"])


def images_of(recipe: Recipe, folder: Path, images: Any) -> Any:
    """Return the images to continue with: those given, or the source in the run's settings.

    Raises:
        InputError: none are given, and the run was trained on an array.
    """
    if images is None and recipe.data.source == "array":
        raise InputError(f"{folder} was trained on an array, which is not stored: pass the images")
    return recipe.data.source if images is None else images


def is_begun(folder: Path, saved: Saved | None, more: More) -> bool:
    """Return whether this continuation has begun and is to be resumed.

    False: the run is finished, and the continuation can begin.

    Args:
        folder, saved: the run and its newest checkpoint.
        more: what is asked for now.

    Raises:
        InputError: the run is not finished, or its last continuation asked for something else.
    """
    if saved is None:
        raise InputError(f"{folder} has no finished run to continue: train one first")
    records = read_config(folder).get("continued", [])
    # Pictures and figures come last. After a kill before summary.json, the same one goes on.
    whole = saved.meta["finished"] and (folder / "summary.json").exists()
    if whole and saved.meta.get("continued", 0) == len(records):
        return False
    last = records and More(records[-1]["more_epochs"], records[-1]["more_minutes"])
    if not last:
        raise InputError(f"{folder} is not finished: run its command again, without {more}")
    if last != more:
        raise InputError(f"{folder} has not yet finished {last}: run that again before {more}")
    return True


def longer(recipe: Recipe, epochs: int, taken: int, num_images: int) -> Recipe:
    """Return a recipe whose stage 1 is longer by some epochs.

    Stage 2 and the schedules of the learning rates are scaled in proportion.

    Args:
        recipe: the run's settings.
        epochs: number of further passes over the training images.
        taken: steps that stage 1 has taken; fewer than its length if it ended early.
        num_images: number of training images.
    """
    first = recipe.first
    if taken < first.total_steps(num_images):
        first = first.lasting(steps=taken)
    if first.epochs is not None:
        length, first = first.epochs, first.lasting(epochs=first.epochs + epochs)
        share = (length + epochs) / length
    else:
        length = first.total_steps(num_images)
        steps = length + epochs * first.steps_per_epoch(num_images)
        first, share = first.lasting(steps=steps), steps / length
    second = recipe.second
    if second is not None and second.epochs is not None:
        second = second.lasting(epochs=max(1, round(share * second.epochs)))
    elif second is not None:
        second = second.lasting(steps=max(1, round(share * (second.steps or 0))))
    return replace(recipe, first=first, second=second)


def steps_of_first(folder: Path, saved: Saved) -> int:
    """Return the number of steps that stage 1 has taken; fewer than its length if it ended early.

    Raises:
        InputError: the folder was shared, without this number.
    """
    if "stage1.step" not in saved.tensors:
        raise InputError(
            f"{folder} was shared without the state of its training and cannot be continued: "
            "start another run from it (--from, start_from=)"
        )
    return int(saved.tensors["stage1.step"])


def record(
    folder: Path, more: More, old: Recipe, new: Recipe, step: int, num_images: int
) -> dict[str, Any]:
    """Return the entry of config.json about a continuation; see `folder.Continuation`.

    Args:
        folder: the run's folder.
        more: what was asked for.
        old, new: the settings before and after.
        step: number of steps of stage 1 so far.
        num_images: number of training images.
    """
    rates = (
        [stage.learning_rate_at(number, num_images) for number in range(step)]
        for stage in (old.first, new.first)
    )
    return {
        "more_epochs": more.epochs,
        "more_minutes": more.minutes,
        "step": step,
        "first": lengths(old.first),
        "second": old.second and lengths(old.second),
        "moments": "new" if _last_state(folder, step) is None else "kept",
        "other_rates": sum(was != now for was, now in zip(*rates, strict=True)),
    }


def lengths(stage: Stage) -> dict[str, Any]:
    """Return the length of a stage and the schedule that goes with it."""
    return {name: getattr(stage, name) for name in ("epochs", "steps", "halve_every")}


def in_words(entry: dict[str, Any], old: Recipe, new: Recipe, num_images: int) -> str:
    """Return one line about a continuation: lengths, learning rates, and what is trained anew.

    Args:
        entry: see `record`.
        old, new, num_images: see `record`.
    """
    step, total = entry["step"], new.first.total_steps(num_images)
    before = old.first.learning_rate_at(max(0, step - 1), num_images)
    after = new.first.learning_rate_at(step, num_images)
    rate = f"learning rate {after:.3g}"
    rate += f" (it was {before:.3g} at the end)" if after != before else ""
    line = f"continuing stage 1 from step {step:,} to {total:,}, {rate}"
    if new.second is not None:
        line += f"; stage 2 is trained anew, {new.second.total_steps(num_images):,} steps"
    if entry["moments"] == "new":
        line += "; the moments of Adam were not kept and begin at zero"
    if not entry["other_rates"]:
        return line + (
            "" if entry["moments"] == "new" else "; the result is that of a run of this length"
        )
    return line + (
        f"; a run of this length would have had other learning rates in {entry['other_rates']:,} "
        f"of the first {step:,} steps"
    )


def history_of(folder: Path) -> dict[str, Any]:
    """Return what config.json says about the start of a run and about its continuations."""
    return {k: v for k, v in read_config(folder).items() if k in ("start", "continued")}


def rewound(folder: Path, saved: Saved | None) -> Saved | None:
    """Return the checkpoint from which training goes on, at the end of stage 1 if it is continued.

    See the module's docstring. If no continuation is recorded that has not begun, `saved` is
    returned.

    Args:
        folder: the run's folder.
        saved: its newest checkpoint, or None.
    """
    records = read_config(folder).get("continued", []) if saved is not None else []
    if saved is None or saved.meta.get("continued", 0) >= len(records):
        return saved
    step = records[-1]["step"]
    tensors = _last_state(folder, step) or under("stage1", saved.tensors)
    if "best.waited" in tensors:
        tensors["best.waited"] = torch.zeros_like(tensors["best.waited"])
    meta = {"stage": 1, "step": int(tensors["step"]), "seconds": saved.meta["seconds"]}
    meta |= {"finished": False, "continued": len(records)}
    again = Saved({f"stage1.{name}": tensor for name, tensor in tensors.items()}, meta)
    start = {name: t for name, t in saved.tensors.items() if name.startswith("start.")}
    again.tensors.update(start)  # stage 2's initial weights, of a run that started from another
    for name in OF_OLD_WEIGHTS:
        remove(folder / name)
    older = checkpoints(folder / "checkpoints")
    save_checkpoint(folder / "checkpoints", meta["step"], again.tensors, meta)
    for path in older:
        if int(path.name) != meta["step"]:
            remove(path)
    return again


def _last_state(folder: Path, step: int) -> dict[str, torch.Tensor] | None:
    """Return the kept state of stage 1 at its end, with the moments of Adam, or None.

    None: the folder is missing, damaged, or belongs to another step.
    """
    if not (folder / LAST).is_dir():
        return None
    with suppress(RunError):
        tensors = read_folder(folder / LAST).tensors
        if "step" in tensors and int(tensors["step"]) == step:
            return tensors
    return None
