"""Balances by name, for the command and for recipes."""

from pkgutil import resolve_name

from poise.balance.contract import Balance
from poise.support.specs import make_named
from poise.variants import BALANCES


def make_balance(spec: str, **known: int) -> Balance:
    """Return the balance that a short text names.

    Args:
        spec: a key of `poise.variants.BALANCES`, then options after a colon, separated by commas, as
            in "computed", "fixed:gamma2=0.5", "computed:start=1,monotone=true".
        known: values for options that the text may leave out and the balance may not take:
            `image_size` and `latent_dim` of the network, for "released".

    Raises:
        InputError: unknown name or option, a value that is not a number or true/false, or one that
            is out of range.

    Example:
        >>> make_balance("fixed:gamma2=0.5").gamma2
        tensor(0.5000)
    """
    makers = {name: resolve_name(balance.home) for name, balance in BALANCES.items()}
    return make_named("balance", makers, spec, **known)
