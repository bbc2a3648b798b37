"""Balances by name, for the command and for recipes."""

from poise.balance.contract import Balance
from poise.balance.following import ComputedBalance, LearnedBalance, OptimalBalance
from poise.balance.steering import (
    ConstrainedBalance,
    ControlledBalance,
    FixedBalance,
    ScheduledBalance,
)
from poise.support.specs import make_named

BALANCES = {
    "computed": ComputedBalance,
    "released": ComputedBalance.released,
    "learned": LearnedBalance,
    "optimal": OptimalBalance,
    "fixed": FixedBalance,
    "scheduled": ScheduledBalance,
    "constrained": ConstrainedBalance,
    "controlled": ControlledBalance,
}


def make_balance(spec: str, **known: int) -> Balance:
    """The balance that a short text names: a name, then options after a colon, separated by commas.

    Args:
        spec: for instance "computed", "fixed:gamma2=0.5", "computed:start=1,monotone=true".
        known: values for options that the text may leave out and the balance may not take: `image_size` and `latent_dim`
            of the network at hand, for "released".

    Raises:
        InputError: unknown name or option, a value that is not a number or true/false, or one out of range.

    Example:
        >>> make_balance("fixed:gamma2=0.5").gamma2
        tensor(0.5000)
    """
    return make_named("balance", BALANCES, spec, **known)
