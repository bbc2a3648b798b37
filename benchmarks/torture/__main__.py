"""The command `python -m benchmarks.torture`."""

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.cases import as_json, import_what_commands_import
from benchmarks.torture.page import PAGE, PARTS, RESULTS, read_reports, with_tables
from poise.support.files import write_file, write_json
from poise.support.version import __version__


def main() -> None:
    options = parser().parse_args()
    if options.page:
        text = PAGE.read_text(encoding="utf-8")
        write_file(PAGE, with_tables(text, read_reports(options.results)).encode())
        return
    import_what_commands_import()
    failed = 0
    for name in options.parts or list(PARTS):
        report = run(name, options)
        failed += len(report["failed"])
        write_json(options.results / f"torture-{name}.json", report)
        tell(name, report)
    sys.exit(bool(failed))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.torture", description="Try to break what Poise promises."
    )
    made.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--jobs", type=int, default=2, help="processes")
    made.add_argument("--scale", type=float, default=1.0, help="share of the full number of cases")
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--page", action="store_true", help="write the tables of docs/reliability.md")
    return made


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part and return its report."""
    part = importlib.import_module(f"benchmarks.torture.{name}")
    began = time.monotonic()
    cases, figures = part.cases(options.seed, options.jobs, options.scale)
    return {
        "part": name,
        "seed": options.seed,
        "scale": options.scale,
        "seconds": round(time.monotonic() - began),
        "versions": {
            "poise": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        **as_json(cases),
        "figures": figures,
    }


def tell(name: str, report: dict[str, Any]) -> None:
    tried = sum(row["tried"] for row in report["groups"])
    print(f"{name}: {tried} cases in {report['seconds']} s, {len(report['failed'])} failed")
    for case in report["failed"]:
        print(f"  {case['outcome']}: {case['group']}: {case['what']}: {case['detail']}")


if __name__ == "__main__":
    main()
