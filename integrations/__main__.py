"""Run the integrations, each in a process of its own, and write their figures to one JSON file."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import between
from integrations.comparing import changed_lines, tables
from poise.studies.results import provenance
from poise.support.files import write_json

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "your-loop.md"
BEGINNING = "<!-- integrations: written by `python -m integrations --page` -->"
END = "<!-- end of integrations -->"
# Module, the library (if its version matters), and the loss that it is compared with.
INTEGRATIONS = {
    "a loop over a table": ("table_loop", "", "TabSyn's: mean SE + CE + 0.01 mean KL"),
    "action chunks (ACT)": ("action_chunks", "", "ACT's: mean L1 + 10 KL"),
    "Lightning": ("lightning_vae", "lightning", "Lightning Bolts': mean SE + 0.1 mean KL"),
    "diffusers AutoencoderKL": (
        "diffusers_autoencoder",
        "diffusers",
        "latent diffusion's: L1 + features + 1e-6 KL",
    ),
    "pythae VAE": ("pythae_vae", "pythae", "pythae's: SE / 2 + KL"),
    "pythae IWAE": ("pythae_iwae", "pythae", "pythae's IWAE"),
    "accelerate": ("accelerate_loop", "accelerate", "the usual: SE + KL"),
    "FSDP2, two ranks": ("fsdp2", "", "the usual: SE + KL"),
}


def measured(name: str, seeds: int, steps: int | None) -> dict[str, Any]:
    """Run an integration and return its figures.

    Args:
        name: a key of `INTEGRATIONS`.
        seeds: number of seeds.
        steps: length of each training. None: its own.
    """
    module, library, own_loss = INTEGRATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = ["-m", f"integrations.{module}", "--seeds", str(seeds), "--json", str(out)]
        command += [] if steps is None else ["--steps", str(steps)]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    versions = {library: version(library)} if library else {}
    lines = changed_lines(HERE / f"{module}.py")
    return {"own_loss": own_loss, "lines": lines, "versions": versions, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=INTEGRATIONS, default=list(INTEGRATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="length of every training, for a quick try")
    parser.add_argument("--json", type=Path, default=Path("results/integrations.json"))
    parser.add_argument(
        "--page", action="store_true", help="write the table of the JSON file into the docs"
    )
    options = parser.parse_args()
    if options.page:
        table = tables(json.loads(options.json.read_text()))
        PAGE.write_text(between(PAGE.read_text(), BEGINNING, END, table))
        return
    earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
    found: dict[str, Any] = earlier.get("integrations", {})
    for name in options.only:
        began = time.perf_counter()
        try:
            figures = measured(name, options.seeds, options.steps)
        except (subprocess.CalledProcessError, PackageNotFoundError) as error:
            sys.exit(f"{name}: {error}; `make integrations` installs what it needs")
        found[name] = figures | {"minutes": round((time.perf_counter() - began) / 60, 2)}
        ordered = {name: found[name] for name in INTEGRATIONS if name in found}
        write_json(
            options.json, {"integrations": ordered, "provenance": provenance(torch.device("cpu"))}
        )
    print(tables(json.loads(options.json.read_text())))


if __name__ == "__main__":
    main()
