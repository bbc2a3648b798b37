"""Balances by name, for the command and for recipes."""

import inspect

from poise.balance.contract import Balance
from poise.balance.following import ComputedBalance, LearnedBalance, OptimalBalance
from poise.balance.steering import ConstrainedBalance, ControlledBalance, FixedBalance, ScheduledBalance
from poise.errors import InputError

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
    name, _, options = spec.partition(":")
    if name not in BALANCES:
        raise InputError(f"unknown balance {name!r}; there are {', '.join(BALANCES)}")
    make = BALANCES[name]
    allowed = inspect.signature(make).parameters
    values: dict[str, float | bool | str] = {key: value for key, value in known.items() if key in allowed}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in allowed:
            raise InputError(f"balance {name!r} has no option {key!r}; it takes {', '.join(allowed)}")
        values[key] = _parse(key, value, allowed[key].default)
    missing = [key for key, p in allowed.items() if p.default is p.empty and key not in values]
    if missing:
        raise InputError(f"balance {name!r} needs {', '.join(missing)}: write {name}:{missing[0]}=NUMBER")
    return make(**values)


def _parse(key: str, value: str, default: object) -> float | bool | str:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise InputError(f"{key}={value!r} is neither true nor false")
        return value == "true"
    if value == default:  # the one option that takes a word: start=first-batch
        return value
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"{key}={value!r} is not a number") from None
    return int(number) if number.is_integer() else number
