"""Make balances from short texts, for the command line and for recipes."""

from pkgutil import resolve_name

from poise.balance.contract import Balance
from poise.support.specs import make_named
from poise.variants import BALANCES


def make_balance(spec: str, **known: float) -> Balance:
    """Return the balance described by a short text.

    Args:
        spec: a key of `poise.variants.BALANCES`, then a colon and options separated by commas:
            "computed", "fixed:gamma2=0.5", "computed:start=1,monotone=true".
        known: defaults for options that the text leaves out: `image_size` and `latent_dim` of the
            network, for "released", or `groups` and `floor`. Balances without such an option ignore
            them.

    Raises:
        InputError: the name or an option is unknown, or a value is out of range or is neither a
            number nor true/false.

    Example:
        >>> make_balance("fixed:gamma2=0.5").gamma2
        tensor(0.5000)
    """
    makers = {name: resolve_name(balance.home) for name, balance in BALANCES.items()}
    return make_named("balance", makers, spec, **known)
