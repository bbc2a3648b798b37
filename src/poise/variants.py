"""Lists of balances, priors and data sets by name.

To add one, write its module and add an entry here. The list of metrics is `poise.metrics.listed`.

The command line reads these lists for its help and must not import torch for it. So an entry names
its class or function as "package.module:name", and `pkgutil.resolve_name` imports it at first use.
"""

from dataclasses import dataclass
from typing import Literal

from poise.errors import InputError

PriorName = str  # a key of PRIORS
SecondStage = Literal["vae", "flow"]
Proposal = Literal["refined", "encoder"]  # of importance samples, see `poise.metrics.likelihood`

# Defaults of `Run.score` and of `poise score`.
SCORE_SAMPLES, SCORE_TRAINING_IMAGES = 20, 500
SCORE_PROPOSAL: Proposal = "encoder"


@dataclass(frozen=True)
class NamedBalance:
    """Describe a balance in `BALANCES`.

    Attributes:
        home: the class, or a function that returns a balance, as "package.module:name". Its
            parameters are the options of this balance.
        examples: example texts for `poise.balance.make_balance`, shown in the help.
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
        "poise.balance.steering:ControlledBalance", ("controlled:target_bits=30",)
    ),
}


@dataclass(frozen=True)
class NamedPrior:
    """Describe a prior in `PRIORS`.

    Attributes:
        home: the class, a `poise.priors.Prior` with `fitted(model: TrainedModel)`, as
            "package.module:name".
        label: name of its samples in tables. It begins with "GEN-".
        words: name of the prior in sentences, for "latents are drawn from ...".
        needs: trained part that it is made from: the posteriors of the training images ("codes"),
            a second stage of this kind ("vae" or "flow"), or nothing.
    """

    home: str
    label: str
    words: str
    needs: Literal["nothing", "codes", SecondStage] = "codes"

    @property
    def second_stage(self) -> SecondStage | None:
        """The kind of second stage that the prior is made from, or None."""
        return self.needs if self.needs in ("vae", "flow") else None


PRIORS = {
    "normal": NamedPrior("poise.priors.normal:NormalPrior", "GEN-1", "N(0, I)", needs="nothing"),
    "second-stage": NamedPrior(
        "poise.priors.second_stage:SecondStagePrior",
        "GEN-2",
        "the second stage",
        needs="vae",
    ),
    "mixture": NamedPrior(
        "poise.priors.mixture:MixturePrior",
        "GEN-mixture",
        "a mixture of Gaussians fitted to the training codes",
    ),
    "flow": NamedPrior("poise.priors.flow_prior:FlowPrior", "GEN-flow", "the flow", needs="flow"),
}


def find_prior(name: str) -> NamedPrior:
    """Return the entry of a prior by name.

    Args:
        name: a key of `PRIORS`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in PRIORS:
        raise InputError(f"unknown prior {name!r}; there are {', '.join(PRIORS)}")
    return PRIORS[name]


def available_priors(second_stage: SecondStage | None) -> tuple[PriorName, ...]:
    """Return the names of the priors that can be made from a model.

    Args:
        second_stage: kind of the model's trained second stage. None: it has none.
    """
    return tuple(
        name for name, prior in PRIORS.items() if prior.second_stage in (None, second_stage)
    )


def default_prior(second_stage: SecondStage | None) -> PriorName:
    """Return the name of the default prior for samples: that of the second stage, or "normal".

    Args:
        second_stage: kind of the model's trained second stage. None: it has none.
    """
    if second_stage is None:
        return "normal"
    return next(name for name, prior in PRIORS.items() if prior.second_stage == second_stage)


@dataclass(frozen=True)
class NamedDataSet:
    """Describe a data set in `DATA_SETS`.

    Its files are searched in the data folder first, then on the Hugging Face Hub.

    Attributes:
        folder: its folder inside the data folder, in torchvision's layout (see
            `poise.data.layouts`).
        files: the expected files, for error messages.
        archives: names of .npz files in the data folder that may be read instead.
        hub: its name on the Hub.
        reader: function that returns the images of a data set that has no files.
        preparation: function from `Reading` to `Reading` that sets crop, size and channels of the
            images from the Hub.
        protocol: name of the protocol of its authors' published numbers, if any.
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
