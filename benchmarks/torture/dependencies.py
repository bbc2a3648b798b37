"""Part 7: licences of what the package installs, known vulnerabilities, and forbidden calls.

The licences come from the metadata of the installed packages: the core and each extra, with what
they need in turn. Vulnerabilities come from pip-audit, if it is installed and its service can be
reached. `forbidden_calls` walks the source: no pickle, eval, exec or yaml.
"""

import ast
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from sysconfig import get_path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.torture.cases import OK, REFUSED, Case

SOURCE = Path(__file__).parents[2] / "src" / "poise"
OF_DEVELOPERS = {"all", "docs", "test"}  # "all" has the packages of the other extras
AUDIT_SECONDS = 120.0
AUDIT_OPTIONS = ("--format", "json", "--progress-spinner", "off")

# Licences that allow use and distribution together with MIT. Others need a look.
PERMISSIVE = re.compile(
    r"mit|bsd|apache|isc|psf|python software|mpl|mozilla|hpnd|historical permission|unlicense"
    r"|zlib|0bsd|cc0|public domain|boost|zpl",
    re.IGNORECASE,
)
# Code that could run what a file says. torchvision's CIFAR-10 is a pickle: its reader allows only
# the functions that rebuild an array.
MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib.load")
FUNCTIONS = ("eval", "exec", "compile", "__import__")
METHODS = {"torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle"}
ALLOWED = {
    ("data/layouts.py", "import pickle"),  # ArrayUnpickler, which refuses all but arrays
    ("features/weights.py", "import pickle.UnpicklingError"),  # the error alone
    ("metrics/reference_statistics.py", "import pickle.UnpicklingError"),  # the same
}


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    found = [*licence_cases(), *vulnerability_cases()]
    calls = list(forbidden_calls(SOURCE))
    found += [Case("calls in the source", call, "wrong") for call in calls]
    files = list(SOURCE.rglob("*.py"))
    found += [Case("calls in the source", str(path), OK) for path in files if not calls]
    return found, licence_table()


# Licences


def needed(name: str, extra: str = "") -> dict[str, Distribution | None]:
    """Return what a package needs, and what that needs in turn; None: it is not installed."""
    found: dict[str, Distribution | None] = {}
    waiting = [(name, extra)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            there = distribution(one[0])
        except PackageNotFoundError:
            found[one[0]] = None
            continue
        found[one[0]] = there
        for text in there.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": one[1]}):
                normal = re.sub(r"[-_.]+", "-", requirement.name).lower()
                waiting += [(normal, inner) for inner in ("", *requirement.extras)]
    return found


def licence_of(package: Distribution) -> str:
    """Return the licence in a package's metadata, or else the first line of its file."""
    metadata: Any = package.metadata  # an email.message.Message
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or ()
        if text.startswith("License ::")
    ]
    text = (metadata.get("License") or "").strip().partition("\n")[0]
    if classifiers or text not in ("", "UNKNOWN"):
        return ", ".join(classifiers) or text[:60]
    files = [file for file in package.files or () if file.name.upper().startswith("LICEN")]
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    return next(filter(None, lines), "not stated")[:60]


def packages() -> dict[str, dict[str, Distribution | None]]:
    """Return the packages that the core needs, and those that each extra adds."""
    core = needed("poise")
    extras = distribution("poise").metadata.get_all("Provides-Extra") or ()
    added = {extra: needed("poise", extra) for extra in sorted({*extras} - OF_DEVELOPERS)}
    return {"core": {k: v for k, v in core.items() if k != "poise"}} | {
        extra: {name: there for name, there in found.items() if name not in core}
        for extra, found in added.items()
    }


def licence_cases() -> Iterator[Case]:
    for part, found in packages().items():
        for name, there in sorted(found.items()):
            if there is None:
                yield Case("licences", f"{name} ({part})", REFUSED, "not installed here")
                continue
            licence = licence_of(there)
            permissive = PERMISSIVE.search(licence) or is_nvidia(name)
            outcome = OK if permissive else "wrong"
            yield Case("licences", f"{name} {there.version} ({part})", outcome, licence)


def is_nvidia(name: str) -> bool:
    """Return whether a package is a part of CUDA, which torch's builds for NVIDIA GPUs bring."""
    return name.startswith(("nvidia-", "cuda-"))


def licence_table() -> dict[str, Any]:
    """Return the packages of each part by licence."""
    table: dict[str, Any] = {}
    for part, found in packages().items():
        of: dict[str, list[str]] = {}
        for name, there in sorted(found.items()):
            of.setdefault(licence_of(there) if there else "not installed here", []).append(name)
        for licence, names in sorted(of.items()):
            table[f"{part}: {licence}"] = {"packages": ", ".join(names)}
    return table


# Vulnerabilities


def vulnerability_cases() -> Iterator[Case]:
    """Ask pip-audit, if it is on the path, about the packages that the project installs.

    It may be installed elsewhere: `pipx install pip-audit`.
    """
    ours = {name for found in packages().values() for name, there in found.items() if there}
    try:
        ended = subprocess.run(
            ["pip-audit", "--path", get_path("purelib"), *AUDIT_OPTIONS],
            capture_output=True,
            text=True,
            timeout=AUDIT_SECONDS,
            check=False,
        )
        audited = json.loads(ended.stdout)["dependencies"]
    except FileNotFoundError:
        yield Case("vulnerabilities", "all packages", REFUSED, "pip-audit is not installed")
        return
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
        yield Case("vulnerabilities", "all packages", REFUSED, "no advisory service answers")
        return
    for entry in audited:
        if entry["name"].lower() in ours:
            if "skip_reason" in entry:
                yield Case("vulnerabilities", entry["name"], REFUSED, entry["skip_reason"])
                continue
            known = [one["id"] for one in entry.get("vulns", ())]
            outcome = "wrong" if known else OK
            yield Case("vulnerabilities", entry["name"], outcome, ", ".join(known))


# Calls in the source


def forbidden_calls(source: Path) -> Iterator[str]:
    """Yield each import and call in a folder that could run what a file says."""
    for path in sorted(source.rglob("*.py")):
        name = str(path.relative_to(source))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for found in findings(node):
                if (name, found) not in ALLOWED:
                    yield f"{name}:{node.lineno}: {found}"  # pyright: ignore[reportAttributeAccessIssue]


def findings(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Import):
        return [f"import {n.name}" for n in node.names if n.name.partition(".")[0] in MODULES]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{name.name}" for name in node.names]
        return [f"import {n}" for n in names if n.partition(".")[0] in MODULES or n in MODULES]
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    if called in FUNCTIONS or called in MODULES:
        return [f"{called}()"]
    if called in METHODS:
        safe = {"weights_only": True, "allow_pickle": False}[METHODS[called]]
        given = {k.arg: k.value for k in node.keywords}.get(METHODS[called])
        if not (isinstance(given, ast.Constant) and given.value is safe):
            return [f"{called}() without {METHODS[called]}={safe}"]
    return []
