"""What training changes, and how it is kept in a checkpoint."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poise.balance import Balance
from poise.recipes.settings import Stage
from poise.training.distributed import copy_from_first, ranks, use_global_batch_norm
from poise.vae import VAE

TERMS = ("loss", "reconstruction_nats", "kl_nats", "mse", "gamma2")


class Verdict(NamedTuple):
    """How the steps of a loop went. Held on the device, so that reading it is the loop's choice.

    Attributes:
        failed: 1 from the first step on whose loss or gradient was not finite; from then on no weight moves.
        asked: share of the processes that were asked to stop.
        steps: number of steps, that one included, where the count ends.
        kl, mse, reconstruction, gradient: of the last step counted; gradient is its norm.
    """

    failed: float
    asked: float
    steps: float
    kl: float
    mse: float
    reconstruction: float
    gradient: float


@dataclass
class TrainingState:
    """Everything that a step changes.

    Attributes:
        vae, balance, optimizer: of this stage.
        average: running average of the weights, if the stage keeps one.
        sums: sums since the last log entry of the values in `TERMS`, and their number.
        verdict: the values of a `Verdict`.
        asked: 1 if this process was asked to stop; read by a step of several processes.
        step: batches seen.
    """

    vae: VAE
    balance: Balance
    optimizer: torch.optim.Optimizer
    average: VAE | None
    sums: Tensor
    verdict: Tensor
    asked: Tensor
    step: int = 0

    @property
    def trained(self) -> VAE:
        """The network to use afterwards: the average of the weights where there is one."""
        return self.vae if self.average is None else self.average


def new_state(vae: VAE, balance: Balance, stage: Stage, device: torch.device) -> TrainingState:
    """The state before the first step. Several processes begin with the weights of the first."""
    vae, balance = vae.to(device), balance.to(device)
    if any(parameter.dim() == 4 for parameter in vae.parameters()):
        vae = vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
    if ranks() > 1:
        use_global_batch_norm(vae)
        copy_from_first(vae)
        copy_from_first(balance)
    parameters = [*vae.parameters(), *balance.parameters()]
    on_cuda = (
        device.type == "cuda"
    )  # there the learning rate is a tensor, so that a recorded step follows it
    rate = torch.tensor(stage.learning_rate, device=device) if on_cuda else stage.learning_rate
    optimizer = torch.optim.Adam(
        parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True, capturable=on_cuda
    )
    average = copy.deepcopy(vae).requires_grad_(False) if stage.ema_decay is not None else None
    sums, verdict = (
        torch.zeros(len(TERMS) + 1, device=device),
        torch.zeros(len(Verdict._fields), device=device),
    )
    return TrainingState(
        vae, balance, optimizer, average, sums, verdict, torch.zeros((), device=device)
    )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything an optimiser moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Everything a checkpoint of a stage in progress needs, by name."""
    tensors = {f"vae.{name}": tensor for name, tensor in state.vae.state_dict().items()}
    tensors |= {f"balance.{name}": tensor for name, tensor in state.balance.state_dict().items()}
    if state.average is not None:
        tensors |= {
            f"average.{name}": tensor for name, tensor in state.average.state_dict().items()
        }
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    return tensors | {"sums": state.sums, "step": torch.tensor(state.step)}


def restore_state(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, in place."""
    state.vae.load_state_dict(under("vae", tensors))
    state.balance.load_state_dict(under("balance", tensors))
    if state.average is not None:
        state.average.load_state_dict(under("average", tensors))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer", tensors).items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    parameters = parameters_of(state.optimizer)
    for index, values in moments.items():
        like = parameters[index]  # its memory format is the one that the fused kernel relies on
        moments[index] = {
            key: value if key == "step" else torch.empty_like(like).copy_(value)
            for key, value in values.items()
        }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.sums.copy_(tensors["sums"])
    state.step = int(tensors["step"])


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, without them."""
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + ".")
    }
