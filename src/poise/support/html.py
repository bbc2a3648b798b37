"""Fill in templates, and put pictures into HTML pages that load nothing else."""

import base64
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def templates(package: str, *, autoescape: bool, **options: Any) -> "Environment":
    """Return the environment of a package's folder `templates`. An undefined name is an error.

    Args:
        package: name of the package.
        autoescape: escape every value, for HTML.
        options: further arguments of `jinja2.Environment`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader(package),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return found


def data_uri(content: bytes, kind: str = "png") -> str:
    """Return the content of an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
