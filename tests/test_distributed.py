"""Test that two processes on shards of a batch equal one process on the whole batch."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poise.balance import ComputedBalance, make_balance

WORLD, STEPS, BATCH, WIDTH = 2, 3, 16, 12
SHARDS = {"even": (8, 8), "uneven": (5, 11), "ragged": (5, 11)}
GROUPED = f"computed:groups={WIDTH},per=channel"


def run_steps(spec: str, rows: slice, ragged: bool = False) -> list[list[Tensor]]:
    """Return each step's loss, other terms, gradients and state on these rows of the batch.

    The gradients are those of the inputs and of the parameters.

    Args:
        spec: the balance.
        rows: rows of the batch that this process has.
        ragged: row i has 1 to 12 values. The others are masked, and are cut off where no row of
            this process has them, unless each column is a group.
    """
    balance = make_balance(spec)
    if ragged:  # LearnedBalance's gradient is a small difference, which float32 rounds to 1e-6
        balance = balance.double()
    lengths = torch.arange(BATCH).mul(WIDTH - 1).div(BATCH - 1, rounding_mode="floor") + 1
    mask = (torch.arange(WIDTH) < lengths[:, None])[rows] if ragged else None
    width = int(lengths[rows].max()) if ragged and spec != GROUPED else WIDTH
    generator = torch.Generator().manual_seed(0)
    outcome = []
    for step in range(STEPS):
        target = torch.rand(BATCH, 12, generator=generator, dtype=torch.float64)
        noise, mean, logvar = (
            torch.randn(BATCH, 12, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        # Shards differ in their errors.
        scale = torch.linspace(0.1, 1.0, BATCH).unsqueeze(1) / (1 + step)
        inputs = [
            value[rows].requires_grad_()
            for value in ((target + scale * noise)[:, :width], mean, scale * logvar)
        ]
        options = {} if mask is None else {"mask": mask[:, :width]}
        terms = balance(inputs[0], target[rows, :width], *inputs[1:], **options)
        terms.loss.backward()
        loss = average(terms.loss.detach())
        parameters = []
        for parameter in balance.parameters():
            parameters.append(parameter.grad)  # the same on all ranks, without DDP
            parameter.data -= 1e-2 * parameters[-1]
            parameter.grad = None
        state = [value.double() for value in balance.state_dict().values()]
        grads = [
            F.pad(value.grad, (0, WIDTH - value.shape[1]))
            / (dist.get_world_size() if dist.is_initialized() else 1)
            for value in inputs
        ]
        outcome.append([loss, *terms[1:], balance.gamma2, *parameters, *state, *grads])
    return outcome


class Joined(nn.Module):
    """A model with its balance inside, as docs/your-loop.md advises for `DDP.join`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.balance = ComputedBalance(process_group=False)

    def forward(self, rows: Tensor) -> Tensor:
        codes = torch.zeros(len(rows), 1)
        return self.balance(self.weight * rows, torch.zeros_like(rows), codes, codes).loss


def average(value: Tensor) -> Tensor:
    """Return the average over ranks, as DistributedDataParallel computes it."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def work(rank: int, specs: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    meeting_point = f"file://{folder}/meeting_point"
    dist.init_process_group(
        "gloo",
        init_method=meeting_point,
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    outcome = {}
    for name, sizes in SHARDS.items():
        start = sum(sizes[:rank])
        for spec in [*specs, GROUPED]:
            own = slice(start, start + sizes[rank])
            outcome[name, spec] = run_steps(spec, own, ragged=name == "ragged")
    for spec in specs:
        balance = make_balance(spec).eval()
        # If rank 0 alone communicated here, it would disturb the sum below or hit the timeout.
        if rank == 0:
            balance(*torch.rand(4, 3, 12))
        together = torch.ones(7)
        dist.all_reduce(together)
        outcome["silent", spec] = bool(together.eq(WORLD).all())
    alone = [dist.new_group([each]) for each in range(WORLD)][rank]
    for name, group in (("all", None), ("none", False), ("own", alone)):
        balance = ComputedBalance(process_group=group)
        balance.combine(torch.tensor([0.01 if rank == 0 else 1.0]), torch.zeros(1), 1)
        outcome[name] = balance.gamma2
    joined = DistributedDataParallel(Joined())
    with joined.join():
        for _ in range(2 + 3 * rank):
            joined(torch.full((4, 2), 1.0 + rank)).backward()
    outcome["joined"] = joined.module.balance.gamma2
    dist.barrier()
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, all_specs) -> list[dict]:
    """Return the results of each rank, from new processes without type checks."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        work, (all_specs, str(folder)), nprocs=WORLD, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("shards", SHARDS)
def test_ranks_on_shards_equal_one_process_on_their_union(spec, shards, ranks):
    check(spec, shards, ranks)


@pytest.mark.parametrize("shards", SHARDS)
def test_ranks_share_the_gamma2_of_each_group(shards, ranks):
    check(GROUPED, shards, ranks)


def check(spec: str, shards: str, ranks: list[dict]) -> None:
    whole = run_steps(spec, slice(0, BATCH), ragged=shards == "ragged")
    for step, expected in enumerate(whole):
        first, second = (rank[shards, spec][step] for rank in ranks)
        shared = len(expected) - 3
        torch.testing.assert_close(
            first[:shared], second[:shared], rtol=0, atol=0, msg="the ranks disagree"
        )
        union = first[:shared] + [
            torch.cat(pair) for pair in zip(first[shared:], second[shared:], strict=True)
        ]
        torch.testing.assert_close(union, expected, rtol=1e-6, atol=1e-9)


def test_evaluation_mode_does_not_communicate(spec, ranks):
    assert [rank["silent", spec] for rank in ranks] == [True, True]


def test_unrelated_models_on_two_ranks_keep_their_own_gamma2(ranks):
    """Former defect: errors of 0.01 and 1.0 gave 0.505 to both."""
    for name, expected in {"all": (0.505, 0.505), "none": (0.01, 1.0), "own": (0.01, 1.0)}.items():
        assert [float(rank[name]) for rank in ranks] == pytest.approx(expected)


def test_ranks_with_unequal_numbers_of_batches_end_with_one_gamma2_under_join(ranks):
    """The errors are 1 on rank 0, which ends first, and 4 on rank 1."""
    first, second = (float(rank["joined"]) for rank in ranks)
    assert first == second and 1 < first <= 4
