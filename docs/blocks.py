"""Run the Python blocks of the pages, and parse their `poise` commands.

    python docs/blocks.py [PAGE ...]

The blocks of a page share one namespace, as if they were one program. `SETUP` defines what a page
takes for granted: the reader's data, model or run. Trainings are made short, and what needs the Hub
or other machines is replaced by a double that checks its arguments. Pages with `{code-cell}` are
executed by Sphinx. A command must be accepted by the command's own parser.
"""

import inspect
import io
import shlex
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent

BATCH = """
import numpy as np
import torch
import torch.nn.functional as F
import poise
images = torch.rand(16, 3, 8, 8)
reconstruction = torch.rand(16, 3, 8, 8, requires_grad=True)
mean, logvar = torch.zeros(16, 4), torch.zeros(16, 4)
kl = poise.DiagonalGaussian(mean, logvar).kl()
"""
PICTURES = """
import numpy as np
import poise
images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
"""
RUN = PICTURES + 'run = poise.train(images, out="runs/faces")'
SETUP = {
    "README.md": f"""
{BATCH}
from pathlib import Path
from PIL import Image
Path("photos").mkdir()
for k in range(60):
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 20, 3), np.uint8)).save(
        f"photos/{{k}}.png")
rows = np.random.default_rng(0).normal(size=(60, 20))
""",
    "balances.md": f"""
{BATCH}
actions = torch.rand(16, 5, 7)
actions_hat = torch.rand(16, 5, 7)
is_pad = torch.zeros(16, 5, dtype=torch.bool)
pixel_error, feature_error, error, num_dims = torch.rand(16), torch.rand(16), torch.rand(16), 192
logits, bits = torch.randn(16, 3, 8, 8), (images > 0.5).float()
chosen = [F.one_hot(torch.arange(16) % count, count).float() for count in (3, 2)]
rows, decoded = torch.cat([torch.randn(16, 10), *chosen], 1), torch.randn(16, 15)
""",
    "comparing.md": RUN,
    "diagnosis.md": """
import torch
import poise
images = train = torch.rand(60, 1, 8, 8)
loss = poise.ComputedBalance()
vae = poise.VAE(*poise.networks.mlp((1, 8, 8), 2, hidden=(16,)))
""",
    "trackers.md": RUN,
    "share.md": f"""
{PICTURES}
from poise.runs.onnx_files import export_onnx
run = poise.train(images, out="runs/faces", recipe="images", network="conv", latent_dim=None)
""",
    "outliers.md": """
import numpy as np
clean_rows = np.random.default_rng(0).normal(size=(80, 20))
rows = clean_rows[:20]
""",
    "scores.md": """
import poise
poise.train("digits", out="runs/digits")
""",
    "tables.md": """
import numpy as np
table = np.random.default_rng(0).normal(size=(80, 20))
more_rows = table[:20]
""",
    "training.md": f"""
{RUN}
import torch
encoder, decoder = poise.networks.mlp((3, 8, 8), 4, hidden=(16,))
""",
}
# Code that runs between two blocks of a page: before the block of this number, from 0.
BETWEEN = {("share.md", 1): 'export_onnx(poise.load("runs/faces"), "faces-onnx")'}
LENGTHS = {"epochs": 2, "second_epochs": 2, "batch_size": 20}
OF_PICTURES = {"recipe": "digits", "network": "mlp", "latent_dim": 64}
CONTINUED = ("more_epochs", "more_minutes")


def main(names: list[str]) -> None:
    began = time.perf_counter()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = commands = 0
    for page in pages:
        if names and page.name not in names:
            continue
        text = page.read_text(encoding="utf-8")
        found = [(line, code) for language, line, code in fenced(text) if language == "python"]
        lines = list(poise_commands(text))
        if found:
            execute(page, found)
        for line in lines:
            parse(page, line)
        blocks, commands = blocks + len(found), commands + len(lines)
        if found or lines:
            print(f"{page.name}: {len(found)} blocks ran, {len(lines)} commands parsed")
    seconds = time.perf_counter() - began
    print(f"{blocks} blocks ran and {commands} commands were parsed, in {seconds:.0f} s")


def fenced(text: str) -> Iterator[tuple[str, int, str]]:
    """Yield the language, the number of the first line and the text of each code block."""
    language, first, inside = "", 0, list[str]()
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.startswith("```"):
            inside.append(line)
        elif first:
            yield language, first, "".join(inside)
            first = 0
        else:
            language, first, inside = line.strip("`\n"), number + 1, []


def poise_commands(text: str) -> Iterator[str]:
    """Yield the `poise` commands of blocks without a language, and of those of bash."""
    for language, _, block in fenced(text):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            start = line.find("poise ")
            if start == 0 or line[:start].endswith("-m "):
                yield line[start:]


def execute(page: Path, blocks: list[tuple[int, str]]) -> None:
    """Run the blocks of a page in one namespace, in a folder of their own."""
    space: dict[str, Any] = {"__name__": "page"}
    printed = redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, chdir(folder), doubles(page.name), printed:
        exec(SETUP.get(page.name, ""), space)
        for number, (line, code) in enumerate(blocks):
            exec(BETWEEN.get((page.name, number), ""), space)
            program = "\n" * (line - 1) + code  # keep the numbers of lines
            exec(compile(program, str(page), "exec"), space)


def parse(page: Path, line: str) -> None:
    from poise import cli

    words = shlex.split(line, comments=True)[1:]
    if words[0] == "COMMAND":
        return
    try:
        cli.parse(words)
    except Exception as error:
        sys.exit(f"{page}: {line}: {error}")


@contextmanager
def doubles(page: str) -> Iterator[None]:
    """Make trainings short, and replace what needs other machines, files or the Hub."""
    import joblib
    import numpy as np

    import poise
    from poise.runs import pipeline
    from poise.runs import run as runs
    from poise.studies import comparison
    from poise.variants import DATA_SETS

    def train(images: Any = None, **settings: Any) -> poise.Run:
        inspect.signature(real_train).bind(images, **settings)
        kept = {key: value for key, value in settings.items() if key not in ("minutes", "size")}
        if not kept.keys() & set(CONTINUED):
            kept = LENGTHS | kept
            if not ((isinstance(images, str) and images in DATA_SETS) or "vae" in kept):
                kept = OF_PICTURES | kept
            kept |= {"size": 8} if "size" in settings else {}
        return real_train(images, options=poise.Options(device="cpu", quiet=True), **kept)

    def load(folder: str, **settings: Any) -> poise.Run:
        return real_load("runs/faces" if folder.startswith("hf:") else folder, **settings)

    def compare(images: Any, **settings: Any) -> str:
        inspect.signature(real_compare).bind(images, **settings)
        poise.recipes.settings.Changes(
            **{key: value for key, value in settings.items() if key in poise.recipes.CHANGES}
        )
        return "a table"

    def evaluate(run: Any, *images: Any, **settings: Any) -> Any:
        return real_evaluate(run, *images, **{"extractor": "pixels"} | settings)

    def push(run: Any, name: str, **settings: Any) -> None:
        inspect.signature(real_push).bind(run, name, **settings)

    def data(name: str) -> poise.data.Dataset:
        pixels = np.zeros((12, 3, 8, 8), np.uint8)
        return poise.data.Dataset(name, pixels, pixels, name)

    real_train, real_load, real_compare = pipeline.train, runs.load, comparison.compare
    real_evaluate, real_push = runs.Run.evaluate, runs.Run.push_to_hub
    cluster = types.ModuleType("dask.distributed")
    cluster.Client = lambda address: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    with ExitStack() as replaced:
        for owner, name, double in (
            (pipeline, "train", train),
            (runs, "load", load),
            (comparison, "compare", compare),
            (runs.Run, "push_to_hub", push),
            (runs.Run, "evaluate", evaluate),
        ):
            replaced.enter_context(patch.object(owner, name, double))
        if page == "comparing.md":
            modules = {"dask": types.ModuleType("dask"), "dask.distributed": cluster}
            replaced.enter_context(patch.dict(sys.modules, modules))
            cores = patch.object(joblib, "parallel_config", lambda backend: nullcontext())
            replaced.enter_context(cores)
        if page == "gpu-queue.md":
            replaced.enter_context(patch.object(poise.data, "load", data))
        yield


if __name__ == "__main__":
    main(sys.argv[1:])
