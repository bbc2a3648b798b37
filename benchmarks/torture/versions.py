"""Print constraints for pip: the oldest versions that pyproject.toml allows, with their mends.

    python benchmarks/torture/versions.py > constraints.txt

"numpy>=1.26" becomes "numpy==1.26.*". It needs nothing but Python.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def oldest(requirement: str) -> str:
    """Return the constraint for the oldest version that a requirement allows.

    Example:
        >>> oldest("torch>=2.7"), oldest("safetensors>=0.4.3"), oldest("plotly>=6")
        ('torch==2.7.*', 'safetensors==0.4.3', 'plotly==6.0.*')
    """
    found = re.fullmatch(r"([\w.-]+)>=(\d+)(?:\.(\d+))?(?:\.(\d+))?", requirement)
    if found is None:
        raise ValueError(f"{requirement} is not NAME>=VERSION")
    name, major, minor, mend = found.groups()
    return f"{name}=={major}.{minor or 0}.{mend or '*'}"


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text())["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["plots"]):
        print(oldest(requirement))
