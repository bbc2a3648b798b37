"""Save tensors and plain values to a folder atomically, as safetensors and JSON. Never pickle.

A folder is written under a temporary name. The manifest, with a SHA-256 of each part, comes last.
The folder is then synced to disk and renamed. If the process is killed at any point, a folder with
its final name is complete. The hashes detect later damage.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from poise.errors import InputError, RunError
from poise.latent import DiagonalGaussian
from poise.support.files import (
    convert,
    read_json,
    read_regular,
    remove,
    temporary,
    write_failure,
    write_synced,
)

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
KEPT = 2
NAME = re.compile("[0-9]{10,}", re.ASCII)  # of a checkpoint: the number of its step


class Saved(NamedTuple):
    """The contents of a folder: tensors by name, and plain values."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json: plain values, and the SHA-256 of each part of the folder."""

    meta: dict[str, Any]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Position:
    """Plain values of a checkpoint.

    Attributes:
        stage, step: the stage, and the number of its steps.
        seconds: training time so far.
        finished: whether the run is finished.
        position: number of the step over both stages: the checkpoint's name. None: the checkpoint
            was written before 2026-11-27.
        continued: how often the run had been continued after it was finished.
        validation: see `poise.runs.validation.Validation.outcome`. None: not measured, or stage 1
            is not finished.
    """

    stage: int
    step: int
    seconds: float
    finished: bool
    position: int | None = None
    continued: int = 0
    validation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.stage not in (1, 2) or self.step < 0 or not self.seconds >= 0:
            raise ValueError(f"stage {self.stage}, step {self.step}, {self.seconds} s")


def write_folder(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and plain values to `folder` atomically.

    Raises:
        RunError: the disk is full or not writable. A previous folder of this name is kept.
    """
    writing = temporary(folder)
    replaced = writing.with_name(writing.name + "-old")
    try:
        writing.mkdir(parents=True)
        blob = save_safetensors(
            {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        )
        write_synced(writing / TENSORS, blob)
        manifest = {
            "meta": meta,
            "sha256": {TENSORS: _sha256(blob), "meta": _sha256(_canonical(meta))},
        }
        write_synced(writing / MANIFEST, json.dumps(manifest, indent=1).encode())
        if folder.exists():
            folder.replace(replaced)
        writing.replace(folder)
        remove(replaced)
        _sync_folder(folder.parent)
    except OSError as error:
        if replaced.exists() and not folder.exists():
            with suppress(OSError):
                replaced.replace(folder)
        remove(writing)
        raise write_failure(folder, error) from error


def read_folder(folder: Path) -> Saved:
    """Return what `write_folder` wrote.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        manifest = read_json(folder / MANIFEST, Manifest)
        blob = read_regular(folder / TENSORS)
        for name, content in {TENSORS: blob, "meta": _canonical(manifest.meta)}.items():
            if _sha256(content) != manifest.sha256.get(name):
                raise RunError(
                    f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
                )
        tensors = load_safetensors(blob)
    except InputError as error:
        raise RunError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise RunError(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    return Saved(tensors, manifest.meta)


def read_codes(folder: Path, count: int, latents: int) -> DiagonalGaussian:
    """Return the posteriors of the training images that a run saved, (count, latents).

    Raises:
        RunError: see `read_code_tensors`.
    """
    tensors = read_code_tensors(folder, count, latents)
    return DiagonalGaussian(tensors["mean"], tensors["logvar"])


def read_code_tensors(
    folder: Path, count: int, latents: int, *, mirrored: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of the posteriors that a run saved, (count, latents) each, by name.

    Args:
        folder: the folder of the codes.
        count, latents: number of training images and of latents.
        mirrored: also return those of the mirrored images.

    Raises:
        RunError: a file is missing or damaged, or the codes have another shape or are not finite.
    """
    saved = read_folder(folder).tensors
    names = ("mean", "logvar", *(("mirrored_mean", "mirrored_logvar") if mirrored else ()))
    for name in names:
        found = saved.get(name, torch.empty(0))
        if found.shape != (count, latents) or found.dtype != torch.float32:
            raise RunError(
                f"{folder} is damaged: {name} is {found.dtype} of shape {tuple(found.shape)}, "
                f"not torch.float32 of shape {(count, latents)}"
            )
        if not found.isfinite().all():
            raise RunError(f"{folder} is damaged: {name} is not finite")
    return {name: saved[name] for name in names}


@contextmanager
def fitting(folder: Path, stage: int) -> Iterator[None]:
    """Turn errors of loading tensors that belong to another network into one line.

    Raises:
        InputError: inside the block, names, shapes or types of tensors differ from the network's.
    """
    try:
        yield
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the checkpoint of {folder} does not fit the network of stage {stage} ({reason}): "
            "restore config.json, or pass the network that was trained"
        ) from None


def load_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict into a module, after a check that its parameters are finite numbers.

    Raises:
        RuntimeError: names or shapes differ.
        ValueError: a parameter is not a floating-point number, or not finite.
    """
    for name, parameter in module.named_parameters():
        given = tensors.get(name, parameter)
        if not given.is_floating_point() or not given.isfinite().all():
            raise ValueError(f"{name} ({given.dtype}) holds other values than finite numbers")
    module.load_state_dict(tensors)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(meta: Any) -> bytes:
    return json.dumps(meta, sort_keys=True).encode()


def save_checkpoint(
    folder: Path, position: int, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write a checkpoint under `folder`, and delete all but the newest two.

    Temporary folders of a killed process are deleted too. Folders that Poise did not write stay.

    Args:
        folder: folder of all checkpoints of the run.
        position: number of the step, counted over both stages.
        tensors: tensors by name.
        meta: plain values, see `Position`.

    Raises:
        RunError: the disk is full or not writable, or the run's folder was removed.
    """
    if not folder.parent.is_dir():
        raise RunError(f"{folder.parent} was removed or renamed during training: nothing is saved")
    write_folder(folder / f"{position:010d}", tensors, meta | {"position": position})
    # Checkpoints of later positions are damaged: training went on from an earlier one. A folder
    # without the name of its position is a copy that a user made.
    older = [
        path
        for path in checkpoints(folder)
        if _position(path) <= position and path.name == f"{_position(path):010d}"
    ]
    for old in [*folder.glob(".writing-*"), *older[:-KEPT]]:
        remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, oldest first.

    Each was complete when it was written, but may be damaged since. Folders with other names than
    Poise gives are no checkpoints. A copy under another number has the place of its position.
    """
    named = [path for path in folder.glob("[0-9]*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: (_position(path), path.name == f"{_position(path):010d}"))


def _position(checkpoint: Path) -> int:
    """Return the number of a checkpoint's step: from its manifest, or else from its name.

    Checkpoints from before 2026-11-27 have it in the name only, as have damaged ones.
    """
    with suppress(InputError):
        manifest = read_json(checkpoint / MANIFEST, Manifest)
        position = manifest.meta.get("position")
        if isinstance(position, int) and _is_intact(manifest):
            return position
    return int(checkpoint.name)


def hash_of(folder: Path) -> str:
    """Return the SHA-256 of a saved folder's tensors, as its manifest says it."""
    return read_json(folder / MANIFEST, Manifest).sha256.get(TENSORS, "")


def _is_intact(manifest: Manifest) -> bool:
    return _sha256(_canonical(manifest.meta)) == manifest.sha256.get("meta")


def newest_intact_checkpoint(folder: Path) -> tuple[Saved | None, list[str]]:
    """Return the newest intact checkpoint, and one message per damaged checkpoint newer than it.

    The checkpoint is None if there are none.

    Raises:
        RunError: there are checkpoints and all are damaged.
    """
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            saved = read_folder(path)
            convert(saved.meta, Position, str(path / MANIFEST))
            return saved, complaints
        except (RunError, InputError) as error:
            complaints.append(str(error))
    if complaints:
        raise RunError(
            f"every checkpoint is damaged: {'; '.join(complaints)}; "
            f"delete {folder} to start this run again"
        )
    return None, complaints


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
