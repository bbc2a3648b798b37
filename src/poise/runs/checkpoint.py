"""Save tensors and plain values to a folder atomically, as safetensors and JSON. Never pickle.

A folder is written under a temporary name. The manifest, with a SHA-256 of each part, comes last.
The folder is then synced to disk and renamed. If the process is killed at any point, a folder with
its final name is complete. The hashes detect later damage.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from poise.errors import RunError
from poise.support.files import write_failure, write_synced

MANIFEST = "manifest.json"
KEPT = 2


class Saved(NamedTuple):
    """The contents of a folder: tensors by name, and plain values."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def write_folder(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and plain values to `folder` atomically.

    Raises:
        RunError: the disk is full or not writable. A previous folder of this name is kept.
    """
    writing = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        blob = save_safetensors(
            {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        )
        write_synced(writing / "tensors.safetensors", blob)
        manifest = {
            "meta": meta,
            "sha256": {"tensors.safetensors": _sha256(blob), "meta": _sha256(_canonical(meta))},
        }
        write_synced(writing / MANIFEST, json.dumps(manifest, indent=1).encode())
        replaced = writing.with_name(writing.name + "-old")
        if folder.exists():
            folder.replace(replaced)
        writing.replace(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        _sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise write_failure(folder, error) from error


def read_folder(folder: Path) -> Saved:
    """Return what `write_folder` wrote.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        blobs = {
            "tensors.safetensors": (folder / "tensors.safetensors").read_bytes(),
            "meta": _canonical(manifest["meta"]),
        }
        for name, blob in blobs.items():
            if _sha256(blob) != manifest["sha256"][name]:
                raise RunError(
                    f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
                )
        return Saved(load_safetensors(blobs["tensors.safetensors"]), manifest["meta"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(meta: Any) -> bytes:
    return json.dumps(meta, sort_keys=True).encode()


def save_checkpoint(
    folder: Path, position: int, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write a checkpoint under `folder`, and delete all but the newest two.

    Temporary folders of a killed process are deleted too.

    Args:
        folder: folder of all checkpoints of the run.
        position: number of the step, counted over both stages.
        tensors: tensors by name.
        meta: plain values.

    Raises:
        RunError: the disk is full or not writable.
    """
    write_folder(folder / f"{position:010d}", tensors, meta)
    for old in [*folder.glob(".writing-*"), *checkpoints(folder)[:-KEPT]]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, oldest first.

    Each was complete when it was written, but may be damaged since.
    """
    return sorted(folder.glob("[0-9]*"))


def newest_intact_checkpoint(folder: Path) -> tuple[Saved | None, list[str]]:
    """Return the newest intact checkpoint, and one message per damaged checkpoint newer than it.

    The checkpoint is None if there are none.

    Raises:
        RunError: there are checkpoints and all are damaged.
    """
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return read_folder(path), complaints
        except RunError as error:
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
