"""Damage to one file, by a seeded generator.

bytes      bits are flipped, the file is cut, zeroed, emptied or extended, or its numbers grow
values     a value of a JSON file is replaced, deleted or added
rehashed   a tensor or a value is replaced, and the hashes are made right again
hostile    a named pipe, a folder, a symbolic link or nothing in place of the file, or a copy of a
           checkpoint beside it
code       a pickle that creates a file when it is loaded
bomb       a small archive that unpacks to 2 GiB of zeros, or promises to
"""

import gzip
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from poise.features import cache
from poise.runs.checkpoint import MANIFEST, read_folder, write_folder

ODD_VALUES = ("null", "{}", "[]", '"x"', "-1", "1e308", "1e999", "NaN", "true", '{"a": 1}', "0.5")
DEEP = "[" * 200_000
EXECUTED = "executed"  # the file that a loaded pickle would create
BOMB_BYTES = 2**31


def damage_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "cut", "zero", "empty", "extend", "latin", "deep", "large"))
    place = rng.randrange(max(1, len(content)))
    if kind == "flip":
        for _ in range(rng.choice((1, 8)) if content else 0):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "zero":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    elif kind == "empty":
        content.clear()
    elif kind == "extend":
        content += rng.randbytes(rng.choice((1, 100)))
    elif kind == "latin":
        content[place:place] = b"\xff\xfe"
    elif kind == "large":  # headers hold lengths in their first bytes
        place = rng.randrange(max(1, min(len(content), 128)))
        content[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(LENGTHS))
    else:
        content = bytearray(DEEP, "ascii")
    path.write_bytes(bytes(content))
    return kind


LENGTHS = (0x7FFFFFFF, 0xFFFFFFFF, 0x10000000, 0)


def damage_values(path: Path, rng: random.Random) -> str:
    """Change one value of a JSON file, or of one line of a log."""
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        number = rng.randrange(len(lines))
        lines[number], what = changed_json(json.loads(lines[number]), rng)
        path.write_text("\n".join(lines) + "\n")
        return f"line {number}: {what}"
    text, what = changed_json(json.loads(path.read_text()), rng)
    path.write_text(text)
    return what


def changed_json(content: Any, rng: random.Random) -> tuple[str, str]:
    outer, key = rng.choice(list(places_in(content)))
    action = rng.choice(("replace",) * 4 + ("delete", "add"))
    mark = "@odd value@"
    value = rng.choice(ODD_VALUES + ((DEEP,) if rng.random() < 0.05 else ()))
    if action == "delete":
        del outer[key]
    elif action == "add" and isinstance(outer, dict):
        outer["added"] = mark
    else:
        outer[key] = mark
    what = f"{action} {key!r} {value[:12]}"
    return json.dumps(content).replace(json.dumps(mark), value), what


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of all values."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places_in(value)


def damage_rehashed(path: Path, rng: random.Random) -> str:
    if path.name == MANIFEST:
        return damage_meta(path, rng)
    if not (path.parent / MANIFEST).exists():  # the cache of features, whose files hold their hash
        return damage_features(path, rng)
    saved = read_folder(path.parent)
    name = rng.choice(sorted(saved.tensors))
    tensor, what = changed_tensor(saved.tensors[name], rng)
    tensors = {key: value for key, value in saved.tensors.items() if key != name}
    write_folder(path.parent, tensors | ({} if tensor is None else {name: tensor}), saved.meta)
    return f"{name}: {what}"


def damage_meta(path: Path, rng: random.Random) -> str:
    """Change a plain value of a manifest, and its hash."""
    content = json.loads(path.read_text())
    text, what = changed_json(content["meta"], rng)
    try:
        meta = json.loads(text)
        content["sha256"]["meta"] = hashlib.sha256(
            json.dumps(meta, sort_keys=True).encode()
        ).hexdigest()
    except RecursionError:
        meta = {}
    path.write_text(json.dumps(content | {"meta": "@meta@"}).replace('"@meta@"', text))
    return what


def damage_features(path: Path, rng: random.Random) -> str:
    features, what = changed_tensor(load(path.read_bytes())["features"], rng)
    if features is None:
        path.write_bytes(save({}))
    else:
        digest = cache._digest(path, features)
        path.write_bytes(save({"features": features.contiguous(), "sha256": digest}))
    return what


def changed_tensor(tensor: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor | None, str]:
    kind = rng.choice(("nan", "inf", "rows", "flat", "integers", "double", "dropped"))
    if kind in ("nan", "inf"):
        changed = tensor.clone()
        if changed.is_floating_point() and changed.numel():
            changed.view(-1)[rng.randrange(changed.numel())] = (
                math.nan if kind == "nan" else math.inf
            )
        return changed, kind
    flat = tensor.reshape(-1)
    return {
        "rows": (tensor[: max(1, len(tensor) // 3)] if tensor.dim() else flat).clone(),
        "flat": flat.clone(),
        "integers": tensor.to(torch.int32),
        "double": tensor.double(),
        "dropped": None,
    }[kind], kind


def make_hostile(path: Path, rng: random.Random) -> str:
    kind = rng.choice(("pipe", "folder", "link", "gone", "copy"))
    checkpoint = path.parent
    if kind == "copy" and checkpoint.parent.name == "checkpoints":
        name = rng.choice(("5abc", "999", "9999999999", f"{checkpoint.name} copy", "x"))
        shutil.copytree(sorted(checkpoint.parent.iterdir())[0], checkpoint.parent / name)
        return f"copy as {name}"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    return kind


class _Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def plant_code(path: Path, rng: random.Random) -> str:
    """Replace a pickle by one that creates a file, in the way that its format stores it."""
    target = str(path.parent / EXECUTED)
    calls = {
        "os.mkdir": _Call(os.mkdir, target),
        "eval": _Call(eval, f"__import__('os').mkdir({target!r})"),
        "exec": _Call(exec, f"import os; os.mkdir({target!r})"),
        "os.system": _Call(os.system, f"mkdir {target!r}"),
    }
    name = rng.choice(sorted(calls))
    content = {b"data": calls[name]} if path.suffix != ".pth" else {"weight": calls[name]}
    if path.suffix == ".pth" and rng.random() < 0.5:
        torch.save(content, path)
        return f"{name}, torch.save"
    protocol = rng.randrange(pickle.HIGHEST_PROTOCOL + 1)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return f"{name}, protocol {protocol}"


def make_bomb(path: Path, rng: random.Random) -> str:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(bytes(2**20), 1) * (BOMB_BYTES >> 20))
        return "2 GiB of zeros"
    shape = (BOMB_BYTES >> rng.choice((3, 6)), 8, 8)
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", b"\x93NUMPY\x01\x00v\x00" + head.encode() + b"\n")
    return f"a header of {shape}"


MUTATIONS: dict[str, Callable[[Path, random.Random], str]] = {
    "bytes": damage_bytes,
    "values": damage_values,
    "rehashed": damage_rehashed,
    "hostile": make_hostile,
    "code": plant_code,
    "bomb": make_bomb,
}
