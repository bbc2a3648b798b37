"""Build the release twice, install it in empty environments outside the clone, and run it there.

    python benchmarks/release.py [--only builds core types loop folder extras] [--extras light ...]
        [--pictures FOLDER] [--minutes 1]

Each part ends the script with an error if it fails:

- builds: wheel and sdist from a copy of the clone, and again from another copy: the sdist, and the
  wheel from that sdist. The hashes must agree. The wheel must hold the package and nothing else.
- core: the size of what an installation brings besides torch; every command on a small run; each
  extra that is missing must be named in one line.
- types: a checker of types reads a user's file against the installed wheel. It must accept right
  code and find a wrong argument (py.typed).
- loop, folder: seconds from an empty environment to a balanced VAE in a loop of one's own, and to
  a trained folder of 300 JPEG pictures.
- extras: each extra alone in an environment of its own, with the work that needs it.

Environments see the torch of the interpreter that runs this script, and what torch itself
requires, but none of its other packages. Everything else is installed from the package index.
Without torch in that interpreter, torch is installed too.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.support.files import write_json

ROOT = Path(__file__).parent.parent
PARTS = ("builds", "core", "types", "loop", "folder", "extras")
# Work that needs an extra, as code that runs in an environment with this extra alone. RUN is a
# finished run, PICTURES a folder of JPEG files.
EXTRAS = {
    "light": "poise('evaluate', RUN, '--extractor', 'light', '--images', '20')",
    "eval": """
import torch_fidelity
poise('evaluate', RUN, '--extractor', 'light', '--images', '20')
""",
    "data": """
import datasets
files = datasets.Dataset.from_dict({'image': [str(path) for path in sorted(PICTURES.iterdir())]})
files.cast_column('image', datasets.Image()).save_to_disk('on-disk')
poise('train', 'hf:on-disk', *QUICK, '--out', 'from-datasets')
""",
    "heic": """
import pillow_heif
from PIL import Image
pillow_heif.register_heif_opener()
Path('heic').mkdir()
for path in PICTURES.iterdir():
    Image.open(path).save(Path('heic', path.stem + '.heic'))
poise('train', 'heic', *QUICK, '--out', 'from-heic')
""",
    "track": """
poise('train', PICTURES, *QUICK, '--tensorboard', '--out', 'tracked')
assert list(Path('tracked', 'tensorboard').rglob('events.*'))
""",
    "hub": """
import huggingface_hub
Path('empty').mkdir()
os.environ['HF_HUB_OFFLINE'] = '1'
import poise as package
run = package.load(RUN)
run.save_pretrained('shared')
assert package.load('shared').sample(2).shape == (2, 3, 16, 16)
""",
    "export": """
poise('export', RUN, '--out', 'exported')
import numpy, onnxruntime
files = sorted(Path('exported').glob('*.onnx'))
assert files and all(onnxruntime.InferenceSession(str(file)).get_inputs() for file in files)
""",
    "wandb": """
import poise as package
package.train(str(PICTURES), size=16, network='mlp', epochs=2, second_epochs=2, out='watched',
              callbacks=[package.WandB(mode='offline')])
assert list(Path('watched').rglob('offline-run-*'))
""",
    "plots": """
poise('train', PICTURES, *QUICK, '--out', 'plotted')
assert Path('plotted', 'training.png').stat().st_size > 10_000
""",
}
BUNDLES = ("all", "docs", "test")  # extras of other extras, and those of developers
PRELUDE = """
import os, subprocess, sys
from pathlib import Path
RUN, PICTURES = Path(sys.argv[1]), Path(sys.argv[2])
QUICK = ('--size', '16', '--network', 'mlp', '--epochs', '2', '--second-epochs', '2')
def poise(*words):
    done = subprocess.run([str(Path(sys.prefix, 'bin', 'poise')), *map(str, words)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
"""
CORE = """
poise('train', PICTURES, *QUICK, '--out', RUN)
poise('sample', RUN, '-n', '4', '--out', 'grid.png')
poise('reconstruct', RUN, PICTURES, '--out', 'pairs.png')
first, second = sorted(PICTURES.iterdir())[:2]
poise('interpolate', RUN, first, second, '--out', 'walk.gif')
poise('encode', RUN, PICTURES, '--out', 'codes.npz')
poise('evaluate', RUN, '--extractor', 'pixels', '--images', '20')
poise('diagnose', RUN)
poise('report', RUN, '--out', 'report.html')
poise('explore', RUN, '--out', 'explore.html')
poise('compare', 'digits', '--balances', 'computed', 'learned', '--epochs', '1', '--second-epochs',
      '1', '--seeds', '1', '--out', 'compared')
import poise as package
assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
assert poise('--version').split()[-1] == package.__version__
package.VAEEstimator(2, steps=20).fit([[i % 5, i % 7, i % 3] for i in range(60)]).score([[1, 2, 0]])
"""
# Commands that need an extra, which the core lacks. Each must say so in one line.
MISSING = {
    "track": ["train", "PICTURES", "--tensorboard", "--out", "x"],
    "export": ["export", "RUN", "--out", "x"],
    "data": ["train", "hf:owner/name", "--out", "x"],
    "light": ["evaluate", "RUN", "--extractor", "light"],
    "eval": ["evaluate", "RUN", "--extractor", "dinov2"],
}
DOWNSTREAM = """
import torch
from typing_extensions import assert_type
import poise

balance = poise.ComputedBalance(decay=0.9)
images, latents = torch.rand(4, 1, 8, 8), torch.zeros(4, 2)
terms = balance(images, images, latents, latents)
assert_type(terms, poise.LossTerms)
assert_type(terms.loss, torch.Tensor)
encoder, decoder = poise.networks.mlp(8, 2)
reconstruction, posterior = poise.VAE(encoder, decoder)(torch.rand(4, 8))
assert_type(posterior, poise.DiagonalGaussian)
terms.loss.backward()
run: poise.Run = poise.train(images, epochs=1, options=poise.Options(quiet=True))
assert_type(run.sample(4), torch.Tensor)
"""
WRONG = 'import poise\npoise.ComputedBalance(decay="slow")\n'


@dataclass(frozen=True)
class Environment:
    """An empty virtual environment outside the clone.

    Attributes:
        folder: of the environment.
        work: an empty folder in which its commands run.
    """

    folder: Path
    work: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in `work`; end the script if it fails."""
        return run([self.folder / "bin" / command[0], *command[1:]], self.work, check=check)


def run(
    command: Sequence[str | Path], folder: Path, *, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "POISE_DATA")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:300]} failed:\n{done.stdout}{done.stderr}")
    return done


class Maker:
    """Makes environments in a folder, with one pip for all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torch = torch_alone(folder / "torch-alone")
        self._made = 0
        self._plain: Environment | None = None

    def plain(self, wheel: Path) -> Environment:
        """Return the environment that has the wheel without extras, the same each time."""
        self._plain = self._plain or self.environment(wheel)
        return self._plain

    def environment(self, *packages: str | Path) -> Environment:
        """Return an environment with torch and some packages."""
        self._made += 1
        made = Environment(
            self.folder / f"environment-{self._made}", self.folder / f"work-{self._made}"
        )
        made.work.mkdir()
        run([sys.executable, "-m", "venv", "--without-pip", made.folder], self.folder)
        site = next(made.folder.glob("lib/python*/site-packages"))
        if self.torch is not None:
            (site / "torch.pth").write_text(f"{self.torch}\n")
        if packages:
            command = [sys.executable, "-m", "pip", "--python", made.python, "install", "--quiet"]
            quiet = ["--disable-pip-version-check", "--no-compile"]
            run([*command, *quiet, *packages], made.work)
        return made


def torch_alone(folder: Path) -> Path | None:
    """Make a folder of links to this interpreter's torch and all it requires. None: no torch."""
    try:
        names = list(required("torch"))
    except importlib.metadata.PackageNotFoundError:
        return None
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        site = Path(str(distribution.locate_file("")))
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"bin", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(site / top)
    return folder


def required(name: str, seen: set[str] | None = None) -> Iterator[str]:
    """Yield a package and all that it requires on this machine, without extras."""
    seen = set() if seen is None else seen
    seen.add(name)
    distribution = importlib.metadata.distribution(name)
    yield name
    for line in distribution.requires or ():
        other = re.split(r"[^\w.-]", line)[0].lower()
        needless = "extra ==" in line or other.startswith(("nvidia", "cuda", "triton"))
        if not needless and other not in seen:
            try:
                yield from required(other, seen)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another system or Python


def copied(folder: Path) -> Path:
    """Copy the files that git knows of, with new times."""
    listed = run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(maker: Maker) -> tuple[Path, dict[str, Any]]:
    """Build twice and return the wheel, and what was found."""
    sources = [copied(maker.folder / f"copy-{number}") for number in (0, 1)]
    builder = maker.environment("build", "hatchling")
    when = run(["git", "log", "-1", "--format=%ct"], ROOT).stdout.strip()
    python, hashes = builder.python, []
    for number, through in enumerate((["--sdist", "--wheel"], [])):  # []: the wheel from the sdist
        out = maker.folder / f"dist-{number}"
        where = ["--outdir", out, *through, sources[number]]
        command = [python, "-m", "build", "--no-isolation", *where]
        run(command, maker.folder, SOURCE_DATE_EPOCH=when)
        hashes.append(
            {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(out.iterdir())
            }
        )
    if hashes[0] != hashes[1]:
        sys.exit(f"two builds differ: {json.dumps(hashes, indent=1)}")
    wheel = next((maker.folder / "dist-0").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    strange = [name for name in names if not re.match(r"poise(-[\d.]+\w*\.dist-info)?/", name)]
    if strange or "poise/py.typed" not in names:
        sys.exit(f"the wheel holds other files than the package's, or lacks py.typed: {strange}")
    sizes = {
        path.name: round(path.stat().st_size / 1e6, 3)
        for path in (maker.folder / "dist-0").iterdir()
    }
    return wheel, {"sha256": hashes[0], "megabytes": sizes, "files_of_wheel": len(names)}


SIZES = """
import importlib.metadata, json
from pathlib import Path
sizes = {}
for found in importlib.metadata.distributions():
    files = [Path(str(found.locate_file(file))) for file in found.files or ()]
    inside = [f for f in files if f.resolve().is_relative_to(__import__('sys').prefix)]
    size = sum(file.stat().st_size for file in inside if file.is_file() and file.suffix != '.pyc')
    if size:
        sizes[found.metadata['Name'].lower()] = round(size / 1e6, 2)
print(json.dumps(dict(sorted(sizes.items(), key=lambda item: -item[1]))))
"""


def core(maker: Maker, wheel: Path, finished: Path, pictures: Path) -> dict[str, Any]:
    """Install the wheel without extras, measure what it brings, and run every command."""
    made = maker.plain(wheel)
    sizes = json.loads(made.run("python", "-c", SIZES).stdout)
    made.run("python", "-c", PRELUDE + CORE, finished, pictures)
    said = {}
    for extra, words in MISSING.items():
        places = {"RUN": str(finished), "PICTURES": str(pictures)}
        done = made.run("poise", *[places.get(word, word) for word in words], check=False)
        said[extra] = done.stderr.strip().splitlines()[-1] if done.stderr else ""
        if done.returncode != 2 or f"poise[{extra}]" not in said[extra]:
            sys.exit(f"{extra}: exit code {done.returncode}, {done.stderr}")
    return {
        "megabytes": round(sum(sizes.values()), 1),
        "by_package": sizes,
        "without_an_extra": said,
    }


def types(maker: Maker, wheel: Path) -> dict[str, Any]:
    """Check a user's file against the installed wheel."""
    made = maker.plain(wheel)
    checker = [sys.executable, "-m", "basedpyright", "--pythonpath", made.python]
    (made.work / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    (made.work / "downstream.py").write_text(DOWNSTREAM)
    run([*checker, "downstream.py"], made.work)
    (made.work / "wrong.py").write_text(WRONG)
    done = run([*checker, "wrong.py"], made.work, check=False)
    if done.returncode != 1 or "reportArgumentType" not in done.stdout:
        sys.exit(f"a wrong argument was not found: {done.stdout}{done.stderr}")
    return {"right": "accepted", "wrong argument": "found"}


def timed(steps: dict[str, float], name: str, began: float) -> float:
    now = time.perf_counter()
    steps[name] = round(now - began, 1)
    return now


def loop(maker: Maker, wheel: Path) -> dict[str, Any]:
    """Time the path to a balanced VAE in a loop of one's own."""
    steps: dict[str, float] = {}
    now = began = time.perf_counter()
    made = maker.environment(wheel)
    now = timed(steps, "install", now)
    script = shutil.copy(ROOT / "examples" / "your_own_loop.py", made.work)
    said = made.run("python", script).stdout.splitlines()
    timed(steps, "train", now)
    timed(steps, "all", began)
    return {"seconds": steps, "last_line": said[-1]}


def folder(maker: Maker, wheel: Path, pictures: Path, minutes: float) -> dict[str, Any]:
    """Time the path to a trained folder of pictures."""
    steps: dict[str, float] = {}
    now = began = time.perf_counter()
    made = maker.environment(wheel)
    now = timed(steps, "install", now)
    how = ["--size", "32", "--minutes", str(minutes), "--out", "runs/pictures"]
    said = made.run("poise", "train", pictures, *how)
    now = timed(steps, "train", now)
    made.run("poise", "sample", "runs/pictures", "-n", "16", "--out", "grid.png")
    timed(steps, "sample", now)
    timed(steps, "all", began)
    kept = (made.work / "runs" / "pictures" / "summary.json").read_text()
    return {"seconds": steps, "minutes": minutes, "said": said.stdout, "summary": json.loads(kept)}


def extra(maker: Maker, wheel: Path, name: str, finished: Path, pictures: Path) -> dict[str, Any]:
    """Install one extra alone and do the work that needs it."""
    made = maker.environment(f"{wheel}[{name}]")
    sizes = json.loads(made.run("python", "-c", SIZES).stdout)
    made.run("python", "-c", PRELUDE + EXTRAS[name], finished, pictures)
    return {"megabytes_with_core": round(sum(sizes.values()), 1)}


def declared_extras() -> list[str]:
    """Return the extras of pyproject.toml, each of which must have work in `EXTRAS`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [name for name in project["optional-dependencies"] if name not in BUNDLES]
    if unknown := set(names) - set(EXTRAS):
        sys.exit(f"EXTRAS has no work for {', '.join(sorted(unknown))}: add it")
    return names


def write_pictures(place: Path, count: int = 300) -> Path:
    """Write JPEG pictures of 96x80 pixels: coloured discs on gradients."""
    import numpy as np
    from PIL import Image

    place.mkdir()
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:80, 0:96]
    for number in range(count):
        centre, radius = random.uniform(25, 60, 2), random.uniform(8, 22)
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        low, high, colour = random.uniform(0, 255, (3, 3))
        slope = (columns / 95)[..., None]
        picture = np.where(disc[..., None], colour, low + slope * (high - low))
        Image.fromarray(picture.astype(np.uint8)).save(place / f"{number:03}.jpg", quality=90)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--extras", nargs="*", choices=EXTRAS, default=declared_extras())
    parser.add_argument("--pictures", type=Path, help="folder of JPEG files (default: drawn)")
    parser.add_argument("--minutes", type=float, default=1.0, help="budget of the trained folder")
    parser.add_argument("--wheel", type=Path, help="a wheel to use instead of a new one")
    parser.add_argument("--json", type=Path, default=Path("results/bench-release.json"))
    options = parser.parse_args()
    parts = set(options.only) < set(PARTS) and options.json.exists()  # keep what others found
    report: dict[str, Any] = json.loads(options.json.read_text()) if parts else {}
    report["python"] = sys.version.split()[0]

    def keep(name: str, found: dict[str, Any], said: object) -> None:
        report[name] = found
        write_json(options.json, report)
        print(f"{name}: {said}", flush=True)

    with tempfile.TemporaryDirectory(prefix="poise-release-") as place:
        maker = Maker(Path(place))
        report["torch"] = maker.torch and importlib.metadata.version("torch")
        wheel = options.wheel and options.wheel.resolve()
        if wheel is None:
            wheel, found = build(maker)
            keep("builds", found, f"{wheel.name}, equal twice")
        drawn = write_pictures(Path(place, "pictures"))
        pictures = options.pictures.resolve() if options.pictures else drawn
        few = Path(place, "few")
        few.mkdir()
        for path in sorted(drawn.iterdir())[:120]:
            shutil.copy(path, few)
        finished = Path(place, "run")
        if "core" in options.only:
            found = core(maker, wheel, finished, few)
            keep("core", found, f"{found['megabytes']} MB without torch")
        if "types" in options.only:
            keep("types", types(maker, wheel), "a user's file was checked")
        if "loop" in options.only:
            found = loop(maker, wheel)
            keep("loop", found, found)
        if "folder" in options.only:
            found = folder(maker, wheel, pictures, options.minutes)
            keep("folder", found, found["seconds"])
        for name in options.extras if "extras" in options.only else ():
            if not finished.exists():
                train = "poise('train', PICTURES, *QUICK, '--out', RUN)"
                maker.plain(wheel).run("python", "-c", PRELUDE + train, finished, few)
            found = extra(maker, wheel, name, finished, few)
            keep("extras", report.get("extras", {}) | {name: found}, f"{name} {found}")


if __name__ == "__main__":
    main()
