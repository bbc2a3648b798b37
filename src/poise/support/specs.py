"""Make an object from a short text such as "fixed:gamma2=0.5", for the command and for recipes.

The text is a name, then options after a colon, separated by commas.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin

from poise.errors import InputError

Made = TypeVar("Made")


def make_named(
    kind: str, makers: Mapping[str, Callable[..., Made]], spec: str, **known: float
) -> Made:
    """Make the object that a text such as "fixed:gamma2=0.5" describes.

    Args:
        kind: the kind of object in error messages, such as "balance" or "objective".
        makers: a class or function for each name; its parameters are the options.
        spec: the text.
        known: values of options that the text does not give. A maker without such a parameter does
            not get the value.

    Raises:
        InputError: the name or an option is unknown, an option is missing, or a value is out of
            range or of another type.
    """
    name, _, options = spec.partition(":")
    if name not in makers:
        like = get_close_matches(name, makers, n=1)
        guess = f"; did you mean {like[0]}?" if like else ""
        raise InputError(f"unknown {kind} {name!r}; there are {', '.join(makers)}{guess}")
    make = makers[name]
    allowed = inspect.signature(make).parameters
    values: dict[str, float | bool | str] = {
        key: value for key, value in known.items() if key in allowed
    }
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in allowed:
            raise InputError(
                f"{kind} {name!r} has no option {key!r}; it takes {', '.join(allowed) or 'none'}"
            )
        values[key] = _parse(f"{kind} {name!r}", key, value, allowed[key], f"{name}:{key}")
    missing = [key for key, p in allowed.items() if p.default is p.empty and key not in values]
    if missing:
        raise InputError(
            f"{kind} {name!r} needs {', '.join(missing)}: "
            f"write {name}:{missing[0]}=NUMBER, as in {name}:{missing[0]}=1"
        )
    return make(**values)


def _parse(
    what: str, key: str, value: str, option: inspect.Parameter, example: str
) -> float | bool | str:
    default, words = option.default, _words(option.annotation)
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise InputError(
                f"{key}={value!r} of {what} is neither true nor false: write {example}=true"
            )
        return value == "true"
    if value in words:
        return value
    try:
        number = float(value)
    except ValueError:
        number = default if isinstance(default, (int, float)) else 1
        raise InputError(
            f"{key}={value!r} of {what} is not a number: write {example}={number:g}"
        ) from None
    return int(number) if number.is_integer() else number


def _words(annotation: Any) -> list[str]:
    """Return the words that an option accepts besides numbers, such as start=first-batch."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words(part)]
