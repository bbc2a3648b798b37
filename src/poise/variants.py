"""Balances, priors and data sets by name. To add one, write its module and add one entry here.

The command reads these lists for its help, which must not import torch. So an entry says where its
class or function is, as "package.module:name", and `pkgutil.resolve_name` imports it at first use.
Metrics have their list in `poise.metrics.listed`.
"""

from dataclasses import dataclass
from typing import Literal

from poise.errors import InputError

PriorName = str  # a key of PRIORS


@dataclass(frozen=True)
class NamedBalance:
    """A balance by name.

    Attributes:
        home: its class, or a function that returns one. Its parameters are the options of the name.
        examples: texts for `poise.balance.make_balance`, which the help shows.
    """

    home: str
    examples: tuple[str, ...]


BALANCES = {
    "computed": NamedBalance("poise.balance.following:ComputedBalance", ("computed",)),
    "released": NamedBalance("poise.balance.following:ComputedBalance.released", ("released",)),
    "learned": NamedBalance("poise.balance.following:LearnedBalance", ("learned",)),
    "optimal": NamedBalance("poise.balance.following:OptimalBalance", ("optimal",)),
    "fixed": NamedBalance(
        "poise.balance.steering:FixedBalance", ("fixed:gamma2=1", "fixed:beta=4")
    ),
    "scheduled": NamedBalance(
        "poise.balance.steering:ScheduledBalance", ("scheduled:ramp_steps=1000",)
    ),
    "constrained": NamedBalance(
        "poise.balance.steering:ConstrainedBalance", ("constrained:target_mse=0.01",)
    ),
    "controlled": NamedBalance(
        "poise.balance.steering:ControlledBalance", ("controlled:target_kl=20",)
    ),
}


@dataclass(frozen=True)
class NamedPrior:
    """A prior of latents by name.

    Attributes:
        home: its class, a `poise.priors.Prior` with `fitted(model: TrainedModel)`.
        label: name of its samples in tables. It begins with "GEN-".
        words: what latents are drawn from, for sentences.
        needs: what it is made from: the posteriors of the training images ("codes"), stage 2, or
            nothing that is trained.
    """

    home: str
    label: str
    words: str
    needs: Literal["nothing", "codes", "second stage"] = "codes"


PRIORS = {
    "normal": NamedPrior("poise.priors.normal:NormalPrior", "GEN-1", "N(0, I)", needs="nothing"),
    "second-stage": NamedPrior(
        "poise.priors.second_stage:SecondStagePrior",
        "GEN-2",
        "the second stage",
        needs="second stage",
    ),
    "mixture": NamedPrior(
        "poise.priors.mixture:MixturePrior",
        "GEN-mixture",
        "a mixture of Gaussians fitted to the training codes",
    ),
}


def find_prior(name: str) -> NamedPrior:
    """Return the prior of a name.

    Raises:
        InputError: there is no such prior.
    """
    if name not in PRIORS:
        raise InputError(f"unknown prior {name!r}; there are {', '.join(PRIORS)}")
    return PRIORS[name]


def available_priors(*, second_stage: bool) -> tuple[PriorName, ...]:
    """Return the names of the priors that a model with or without a second stage has."""
    return tuple(n for n, prior in PRIORS.items() if second_stage or prior.needs != "second stage")


def default_prior(*, second_stage: bool) -> PriorName:
    """Return the prior that samples are drawn from if none is named."""
    return "second-stage" if second_stage else "normal"


@dataclass(frozen=True)
class NamedDataSet:
    """A data set by name: in the data folder, or else on the Hugging Face Hub.

    Attributes:
        folder: below the data folder, as torchvision lays it out (see `poise.data.layouts`).
        files: the files that are expected there, for error messages.
        archives: .npz files in the data folder that do as well.
        hub: its name on the Hub.
        reader: function that returns its images, if they are in neither place.
        preparation: function from `Reading` to `Reading`: crop, size and channels of the images
            from the Hub.
        protocol: name of the protocol under which its authors' numbers were measured, if any.
    """

    folder: str = ""
    files: str = ""
    archives: tuple[str, ...] = ()
    hub: str = ""
    reader: str = ""
    preparation: str = ""
    protocol: str = ""


_IDX_FILES = "{train,t10k}-images-idx3-ubyte"
DATA_SETS = {
    "digits": NamedDataSet(reader="poise.data.names:read_digits"),
    "mnist": NamedDataSet("MNIST", f"MNIST/raw/{_IDX_FILES}", ("mnist.npz",), "ylecun/mnist"),
    "fashion-mnist": NamedDataSet(
        "FashionMNIST",
        f"FashionMNIST/raw/{_IDX_FILES}",
        ("fashion-mnist.npz", "fashion.npz"),
        "zalando-datasets/fashion_mnist",
    ),
    "cifar10": NamedDataSet(
        "cifar-10-batches-py",
        "cifar-10-batches-py/",
        ("cifar10.npz",),
        "uoft-cs/cifar10",
        protocol="released",
    ),
    "celeba64": NamedDataSet(
        "celeba",
        "celeba/img_align_celeba/ and celeba/list_eval_partition.txt",
        ("celeba64.npz",),
        "flwrlabs/celeba",
        preparation="poise.data.layouts:celeba_reading",
        protocol="released-celeba",
    ),
}
