"""Start a run from the weights of another one: `--from runs/faces`. New pictures, same network.

Kept: the weights of stage 1, averaged if that run averages them, and those of stage 2 if both runs
have the same kind of stage 2. New: gamma2 and what else a balance knows, because it follows the
error on the new pictures; the optimizer; the schedule of the learning rates; a flow's mean and
scale of the latents; codes, mixture and all figures. config.json says both under "start".
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from poise.balance import Balance
from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.objectives import is_deterministic
from poise.recipes import RECIPES
from poise.recipes.settings import Network, Recipe, asks_for_second, from_json
from poise.runs.checkpoint import (
    checkpoints,
    fitting,
    load_weights,
    newest_intact_checkpoint,
)
from poise.runs.folder import read_config
from poise.runs.sharing import HUB_PREFIX, fetched
from poise.training import under
from poise.vae import VAE

# Settings of the network that other weights cannot change, by the stage whose shapes they decide.
SHAPES = {
    1: ("kind", "latent_dim", "latent_channels", "conv_width", "hidden"),
    2: ("latent_dim", "second_hidden", "flow_width", "flow_blocks"),
}
NEW = ("balance of each stage", "optimizer", "learning rates", "codes and their scale", "mixture")
STATISTICS = ("mean", "std")  # buffers of a flow that describe the codes of its own images


@dataclass(frozen=True)
class Source:
    """The run that another one starts from.

    Attributes:
        folder: its folder.
        name: the folder's absolute path, or hf:OWNER/NAME.
        recipe, data: settings, and the description of its data in config.json.
        tensors: of its newest checkpoint.
        digest: SHA-256 of the weights of stage 1, as safetensors.
        has_second: whether stage 2 has begun.
    """

    folder: Path
    name: str
    recipe: Recipe
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    digest: str
    has_second: bool


def read_source(run: str | Path) -> Source:
    """Read the run that another one starts from.

    Args:
        run: its folder, or "hf:OWNER/NAME".

    Raises:
        InputError: there is no run.
        RunError: it has no intact checkpoint.
    """
    name = _name(run)
    folder = fetched(name) if name.startswith(HUB_PREFIX) else Path(name)
    config = read_config(folder)
    saved, _ = newest_intact_checkpoint(folder / "checkpoints")
    if saved is None:
        raise RunError(f"{folder} has no checkpoint yet, so no run can start from it")
    return Source(
        folder,
        name,
        from_json(Recipe, config["recipe"], f"{folder / 'config.json'}: recipe"),
        config["data"],
        saved.tensors,
        hashlib.sha256(save(_weights(1, saved.tensors))).hexdigest(),
        saved.meta["stage"] == 2 and saved.meta["step"] > 0,
    )


def _name(run: str | Path) -> str:
    text = str(run)
    return text if text.startswith(HUB_PREFIX) else str(Path(text).resolve())


def recipe_of(run: str | Path, out: Path | None, changes: dict[str, Any]) -> Recipe:
    """Return the recipe of a run, for new pictures: the base of the settings of a run from it.

    The new pictures get the size and the channels of the run's. If the run in `out` has begun, its
    own recipe is returned: the source may be gone by now.

    Args:
        run: the source, see `read_source`.
        out: folder of the run that starts.
        changes: settings that the user gave.
    """
    begun = out is not None and bool(checkpoints(out / "checkpoints"))
    if begun and out is not None and read_config(out).get("start", {}).get("run") == _name(run):
        recipe: Recipe = from_json(Recipe, read_config(out)["recipe"])
    else:
        source = read_source(run)
        channels, size, _ = source.data["shape"]
        data = replace(source.recipe.data, size=size, source="array", levels=None)
        data = replace(data, channels=channels) if channels in (1, 3) else data
        recipe = replace(source.recipe, data=data)
        if recipe.second is None and asks_for_second(changes):
            of_preset = RECIPES.get(recipe.name, RECIPES["images"])
            recipe = replace(recipe, second=of_preset.second)
    return recipe


def check_start(folder: Path, start_from: str | Path | None) -> None:
    """Check that a run that has begun is resumed with the start that it began with.

    Raises:
        InputError: it began with another one, or with none.
    """
    began = read_config(folder).get("start", {}).get("run")
    now = None if start_from is None else _name(start_from)
    if began != now:
        raise InputError(
            f"{folder} holds a run that "
            + (f"started from {began}" if began else "started from no other run")
            + f", not from {now}: give the same --from (start_from=), or choose another --out"
        )


def load_start(
    source: Source, recipe: Recipe, shape: list[int], stages: list[tuple[VAE | Flow, Balance]]
) -> dict[str, Any]:
    """Load the weights of the source into new networks; return the entry for config.json.

    Args:
        source: the run that has them.
        recipe, shape: settings of the new run, and shape of its images.
        stages: network and balance of each stage of the new run; the networks are changed.

    Raises:
        InputError: the networks or the images differ in shape.
    """
    differing = _differing(source, recipe, shape)
    if differing:
        raise InputError(
            f"{source.folder} has a network of another shape ({'; '.join(differing)}): "
            "leave these settings out, or start from another run"
        )
    kept, new = ["weights of stage 1"], [*map(str, NEW)]
    networks = [network for network, _ in stages]
    _load(source, 1, networks[0])
    if len(networks) > 1 and _same_second(source, recipe, networks[1]):
        _load(source, 2, networks[1])
        kept.append("weights of stage 2")
    elif len(networks) > 1:
        new.append("weights of stage 2")
    return {"run": source.name, "checkpoint": source.digest, "kept": kept, "new": new}


def start_of_second(stages: list[tuple[VAE | Flow, Balance]]) -> dict[str, Tensor]:
    """Return the initial weights of stage 2 under the names that all checkpoints keep them by.

    They are needed when stage 1 ends, or when the run is continued. The source may be gone then.
    """
    of_second = stages[1][0].state_dict() if len(stages) > 1 else {}
    return {f"start.{name}": tensor.clone() for name, tensor in of_second.items()}


def _load(source: Source, stage: int, network: VAE | Flow) -> None:
    tensors = _weights(stage, source.tensors)
    if isinstance(network, Flow):  # set from the new codes before stage 2 begins
        tensors |= {name: network.state_dict()[name] for name in STATISTICS}
    with fitting(source.folder, stage):
        load_weights(network, tensors)


def _weights(stage: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    mine = under(f"stage{stage}", tensors)
    return under("average", mine) or under("vae", mine)


def _same_second(source: Source, recipe: Recipe, network: VAE | Flow) -> bool:
    same = source.recipe.second_stage == recipe.second_stage and source.has_second
    if isinstance(network, Flow):
        same = same and network.classes == len(source.data.get("classes", ()))
    return same and not _differing_network(source.recipe.network, recipe.network, 2)


def _differing(source: Source, recipe: Recipe, shape: list[int]) -> list[str]:
    lines = _differing_network(source.recipe.network, recipe.network, 1)
    theirs = list(source.data["shape"])
    objectives = source.recipe.first.objective, recipe.first.objective
    if len(set(map(is_deterministic, objectives))) > 1:  # the encoder of a rival is wrapped
        lines.append("objective: {} there, {} here".format(*objectives))
    ways = source.recipe.first.standardise, recipe.first.standardise
    if len(set(ways)) > 1:  # the networks are wrapped
        lines.append("standardise: {} there, {} here".format(*ways))
    if theirs[0] != shape[0]:
        lines.append(f"channels: {theirs[0]} there, {shape[0]} here")
    if theirs[1:] != shape[1:]:
        lines.append(f"size: {'x'.join(map(str, theirs[1:]))} there, {shape[1]}x{shape[2]} here")
    return lines


def _differing_network(theirs: Network, ours: Network, stage: int) -> list[str]:
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in SHAPES[stage]}
    return [f"{name}: {was} there, {now} here" for name, (was, now) in pairs.items() if was != now]
