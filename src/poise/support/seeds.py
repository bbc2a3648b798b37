"""Derive seeds and random generators: every draw is f(seed, purpose, position).

So a stopped run resumes with exactly the same draws. torch's global generator serves modules only,
for their initial weights and for layers such as dropout, and the objective rae-gp. The package
seeds it for them and restores it, while other threads that need it wait. Calling a `VAE` without
noise also draws from it, as the user's own call.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from poise.support.kernels import LOCK, generators_kept

REFERENCE_SEED = -1  # of draws that measure a prior or a model; a user's images have other seeds


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that is a hash of integers and words."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return _to_seed(digest)


def _to_seed(digest: bytes) -> int:
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a random generator with the seed `derive(*parts)`."""
    return torch.Generator(device).manual_seed(derive(*parts))


def noise_per_image(count: int, dims: int, seed: int, first: int = 0) -> torch.Tensor:
    """Return standard normal noise, (count, dims). Row i depends only on (seed, first + i).

    Row i is torch.randn(dims, generator=generator("image", seed, first + i)). The loop is written
    out for speed: callers draw a million rows. PyTorch's generator on the CPU uses 32 bits of a
    seed, so that about n^2 / 2^33 pairs of n rows are equal: 0.3 pairs of 50,000, 116 of a million.

    Args:
        count: number of rows.
        dims: number of columns.
        seed: of all rows.
        first: number of the first row.
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
    """Return `count` of `total` positions, drawn with a fixed seed, ascending; at most all of them.

    Used to choose images for pictures, because the first files of a sorted folder may all be of one
    class.

    Example:
        >>> drawn(3, 5), len(drawn(1000, 5))
        ([0, 1, 2], 5)
    """
    return torch.randperm(total, generator=generator("pictures"))[:count].sort().values.tolist()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and restore its state after it.

    Modules draw their initial weights from it.
    """
    with LOCK, generators_kept(torch.device("cpu")):
        torch.default_generator.manual_seed(seed)
        yield
