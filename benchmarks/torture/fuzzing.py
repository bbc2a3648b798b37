"""Part 2: damage the files that Poise reads, read them, and count what happens.

Each case copies intact material, applies one mutation of a seeded generator to one file, and calls
one reader in a process of its own. A case fails if

- the reader returns other numbers than for intact material, although a hash protects the file, or
  numbers that are not finite;
- it raises another exception than `InputError` or `RunError`, or its process dies;
- it takes more than 10 seconds, or 1 GiB of memory above that of the start;
- code in the file runs.
"""

import hashlib
import random
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.torture.cases import OK, Case, forked, spread
from benchmarks.torture.material import make_material
from benchmarks.torture.mutations import EXECUTED, MUTATIONS
from benchmarks.torture.readers import TARGETS, are_finite, compared, leaves

COUNT = 2_000
STRIDE = 7  # so that few cases have readers of every kind
NOT_FINITE = "not finite"


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    """Return the cases, and no further figures.

    Args:
        seed: of the mutations.
        jobs: processes.
        scale: share of the full number of cases.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        material = Path(scratch, "material")
        make_material(material)
        (material / "comparison").mkdir()
        compared(material / "comparison")
        numbers = range(round(COUNT * scale))
        places = sorted({place_of(number) for number in numbers})
        intact = spread(partial(read_intact, material), places, jobs)
        digests = dict(zip(places, intact, strict=True))
        work = partial(run_case, seed=seed, material=material, digests=digests)
        return spread(work, numbers, jobs), {}


def place_of(number: int) -> int:
    """Return the place of a case's target in `TARGETS`."""
    return number * STRIDE % len(TARGETS)


def read_intact(material: Path, place: int) -> str:
    """Return the digest of what a reader returns for intact material."""
    target = TARGETS[place]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(material / target.folder, Path(scratch, "m"), symlinks=True))
        assert [*folder.glob(target.files)], f"there is no {target.folder}/{target.files}"
        ended = forked(lambda: digest(target.read(folder)), seconds=60)
    if ended.outcome != OK:
        name = f"{target.folder}/{target.files} ({target.read.__name__})"
        raise RuntimeError(f"{name} is intact and cannot be read: {ended.err}")
    return ended.value


def run_case(number: int, *, seed: int, material: Path, digests: dict[int, str]) -> Case:
    rng = random.Random(f"{seed}/{number}")
    place = place_of(number)
    target = TARGETS[place]
    kind = rng.choice(target.kinds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(material / target.folder, Path(scratch, "m"), symlinks=True))
        path = rng.choice(sorted(folder.glob(target.files)))
        what = MUTATIONS[kind](path, rng)
        ended = forked(lambda: digest(target.read(folder)))
        executed = (path.parent / EXECUTED).exists()
    outcome, detail = ended.outcome, ended.message if ended.outcome != OK else ""
    protected = target.hashed and kind != "rehashed"
    changed = outcome == OK and ended.value != digests[place]
    if changed and (protected or ended.value == NOT_FINITE):
        outcome, detail = "wrong", f"other numbers: {ended.value[:12]}"
    if executed:
        outcome, detail = "wrong", "code in the file ran"
    name = f"{target.folder}/{path.relative_to(folder)} ({target.read.__name__})"
    return Case(kind, f"case {number}, {name}: {what}", outcome, detail[:300])


def digest(value: Any) -> str:
    """Return a hash of a reader's result, or "not finite"."""
    if not are_finite(value):
        return NOT_FINITE
    found = hashlib.sha256()
    for part in leaves(value):
        found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()
