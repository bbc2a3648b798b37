"""The training state: network, balance, optimizer and sums, and how to save and restore it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from poise.balance import Balance
from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.recipes.settings import Stage
from poise.training.distributed import ranks, share_gradients
from poise.training.machine import has_convolutions
from poise.vae import VAE

Network = TypeVar("Network", bound=VAE | Flow)
TERMS = ("loss", "reconstruction_nats", "kl_nats", "mse", "gamma2")


class Verdict(NamedTuple):
    """Outcome of the steps of a loop. It stays on the device until the loop reads it.

    Attributes:
        failed: 1 from the first step whose loss or gradient was not finite, else 0. Weights do not
            change after a failure.
        asked: share of the processes that were asked to stop, 0 to 1.
        steps: number of steps up to and including the failure.
        kl, mse, reconstruction: of the last step counted.
        gradient: norm of the gradient in that step.
    """

    failed: float
    asked: float
    steps: float
    kl: float
    mse: float
    reconstruction: float
    gradient: float


@dataclass
class TrainingState(Generic[Network]):
    """The state that a training step changes.

    Attributes:
        network: the VAE or the flow that is trained.
        balance, optimizer: of this stage.
        average: exponential moving average of the weights, if the stage keeps one.
        sums: sums of the values in `TERMS` since the last log entry, and the number of steps.
        verdict: the values of a `Verdict`.
        asked: 1 if this process was asked to stop, else 0. With several processes, each step
            averages it.
        shared: averages gradients over several processes. None: there is only one process.
        ema_share: share of the new weights in the averaged weights, 1 - decay, of the next step.
        step: number of steps taken.
    """

    network: Network
    balance: Balance
    optimizer: torch.optim.Optimizer
    average: Network | None
    sums: Tensor
    verdict: Tensor
    asked: Tensor
    shared: nn.Module | None
    ema_share: Tensor
    step: int = 0

    @property
    def trained(self) -> Network:
        """The network to use after training: with averaged weights, if the stage keeps them."""
        return self.network if self.average is None else self.average


def check_groups(balance: Balance) -> None:
    """Raise InputError for a balance with groups that are not those of its error."""
    if balance.groups is not None and balance.error.groups is None:
        raise InputError(
            f"training logs one gamma2, but this balance has groups={balance.groups}: leave groups "
            "out, or use the balance in a loop of your own"
        )


def new_state(
    network: Network, balance: Balance, stage: Stage, device: torch.device
) -> TrainingState[Network]:
    """Return the state before the first step.

    Weights of convolutions are in `torch.channels_last`, as are the batches of `ImageBatches`. All
    processes start with the weights of rank 0.

    Raises:
        InputError: the balance has groups that are not those of its error.
    """
    check_groups(balance)
    network, balance = network.to(device), balance.to(device)
    if has_convolutions(network):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    balance.data_checked = True  # masks are trained with the error that the recipe says
    shared = share_gradients(network, balance) if ranks() > 1 else None
    parameters = [*network.parameters(), *balance.parameters()]
    on_cuda = device.type == "cuda"  # a recorded step needs the learning rate as a tensor
    rate = torch.tensor(stage.learning_rate, device=device) if on_cuda else stage.learning_rate
    optimizer = torch.optim.Adam(
        parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True, capturable=on_cuda
    )
    average = copy.deepcopy(network).requires_grad_(False) if stage.ema_decay is not None else None
    sums = torch.zeros(len(TERMS) + 1, device=device)
    verdict = torch.zeros(len(Verdict._fields), device=device)
    asked = torch.zeros((), device=device)
    ema_share = torch.zeros((), device=device)  # a tensor, which a recorded step reads
    return TrainingState(
        network, balance, optimizer, average, sums, verdict, asked, shared, ema_share
    )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return all tensors of the checkpoint of a stage in progress, by name.

    The names of the network's tensors begin with "vae", also those of a flow.
    """
    tensors = {f"vae.{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"balance.{name}": tensor for name, tensor in state.balance.state_dict().items()}
    if state.average is not None:
        tensors |= {
            f"average.{name}": tensor for name, tensor in state.average.state_dict().items()
        }
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    return tensors | {"sums": state.sums, "step": torch.tensor(state.step)}


@torch.no_grad()
def check_weights(state: TrainingState, stage: Stage, number: int) -> None:
    """Check that the weights are finite, before they replace those of the last checkpoint.

    A step that is too large can make them infinite, although its loss was finite. So can a batch
    with BatchNorm's running averages, which training does not use.

    Args:
        state: of the stage.
        stage, number: settings and number of the stage.

    Raises:
        RunError: a weight is NaN or infinite.
    """
    networks = [state.network, *([] if state.average is None else [state.average])]
    named = [
        named
        for network in networks
        for named in (*network.named_parameters(), *running_averages(network))
    ]
    names, weights = zip(*named, strict=True)
    finite = torch.stack([weight.isfinite().all() for weight in weights]).tolist()
    if not all(finite):
        raise RunError(
            f"the weights are not finite at step {state.step} of stage {number} "
            f"({names[finite.index(False)]}), and are not saved: try a lower learning rate "
            f"(--learning-rate {stage.learning_rate / 10:g}), with another --out"
        )


def running_averages(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the running averages of BatchNorm by name. Buffers of other layers may be infinite."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            buffers = module.named_buffers(name, recurse=False)
            yield from (named for named in buffers if named[1].is_floating_point())


def restore_state(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """Restore, in place, the tensors that `state_tensors` returned."""
    state.network.load_state_dict(under("vae", tensors))
    state.balance.load_state_dict(under("balance", tensors))
    if state.average is not None:
        state.average.load_state_dict(under("average", tensors))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer", tensors).items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    parameters = parameters_of(state.optimizer)
    for index, values in moments.items():
        like = parameters[index]  # fused Adam needs the moments in the parameter's memory format
        moments[index] = {
            key: value if key == "step" else torch.empty_like(like).copy_(value)
            for key, value in values.items()
        }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.sums.copy_(tensors["sums"])
    state.step = int(tensors["step"])


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix` and a dot, without that prefix."""
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + ".")
    }
