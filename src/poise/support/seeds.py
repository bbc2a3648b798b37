"""Randomness as a function: every draw is f(seed, what it is for, position), so any run can stop and go on exactly.

Nothing here, or anywhere in the package, draws from torch's global generator, but for a user's own networks.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from poise.support.kernels import LOCK, generators_kept

REFERENCE_SEED = -1  # of draws that measure a prior or a model, apart from the images a user draws


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any integers and words; unrelated inputs give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return _to_seed(digest)


def _to_seed(digest: bytes) -> int:
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator seeded by `derive`."""
    return torch.Generator(device).manual_seed(derive(*parts))


def noise_per_image(count: int, dims: int, seed: int, first: int = 0) -> torch.Tensor:
    """Standard normal noise (count, dims), row i a function of (seed, first + i) alone.

    Row i is torch.randn(dims, generator=generator("image", seed, first + i)), written out: a million rows pass through here.
    """
    rows = torch.empty(count, dims)
    source = torch.Generator()
    start = hashlib.blake2b(f"image/{seed}/".encode(), digest_size=8)
    for number, row in enumerate(rows.unbind(), first):
        digest = start.copy()
        digest.update(b"%d" % number)
        row.normal_(generator=source.manual_seed(_to_seed(digest.digest())))
    return rows


def drawn(total: int, count: int) -> list[int]:
    """Return `count` positions out of `total`, drawn with a fixed seed, ascending; all where there are no more.

    For pictures: the first files of a sorted folder may be all of one kind.

    Example:
        >>> drawn(3, 5), len(drawn(1000, 5))
        ([0, 1, 2], 5)
    """
    return torch.randperm(total, generator=generator("pictures"))[:count].sort().values.tolist()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator seeded inside the block and as it was after it: modules draw their weights from it."""
    with LOCK, generators_kept(torch.device("cpu")):
        torch.default_generator.manual_seed(seed)
        yield
