"""The command `poise`: train, sample, encode, reconstruct, evaluate, diagnose, compare, reproduce, report.

Results go to stdout, progress and complaints to stderr. Exit code 0: done; 2: the input is wrong; 1: the work failed.
torch is imported after the arguments are read, so that help is instant.
"""

import contextlib
import io
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from poise.errors import InputError, Interrupted, RunError
from poise.protocols import NO_EXTRACTOR, PROTOCOLS, table
from poise.recipes import EXPERIMENTS, RECIPES, find_recipe
from poise.recipes.settings import Changes, Generation, Recipe, Renormalise, given

if TYPE_CHECKING:
    from poise.comparison import Comparison
    from poise.evaluation import Evaluation
    from poise.run import Run

DESCRIPTION = "Variational autoencoders that balance themselves."
DATA_NAMES = [name for name in RECIPES if name != "images"]
ANY_IMAGES = "a folder, an .npz or .npy array, hf:OWNER/NAME, or a data set's name"
WHOLE_TABLE = 160  # columns: numbers are never cut off, whatever the terminal's width
RECIPES_OWN = "(default: the recipe's)"
BALANCES = (
    "computed, learned, optimal, fixed:gamma2=1, fixed:beta=4, scheduled:ramp_steps=1000, constrained:target_mse=0.01, ..."
)
OBJECTIVES = (
    "vae, or a deterministic rival: autoencoder, rae-l2, rae-gp, wae-mmd:weight=10, ... (balance then fixed:gamma2=0.5)"
)
ENGINES = "compiled: machine code made for the network, for long runs; captured: replay each step as a CUDA graph"
Switch = Literal["on", "off"]
EngineChoice = Literal["eager", "compiled", "captured"]
NetworkChoice = Literal["resnet", "infogan", "wae", "mlp"]
PriorChoice = Literal["normal", "second-stage", "mixture"]


def recipes_own(text: str) -> Any:
    """Help for an option that the recipe decides where it is not given."""
    return arg(help=text, help_behavior_hint=RECIPES_OWN)


@dataclass(frozen=True)
class Train:
    """Train a two-stage VAE whose balance is computed. Run the same command again to go on after an interruption.

    Without DATA and recipe it trains on the 8x8 digits that come with scikit-learn, in about a minute.
    """

    data: Annotated[
        Positional[str | None],
        arg(
            help=f"a folder of images, an .npz or .npy array, hf:OWNER/NAME, or one of {', '.join(DATA_NAMES)}",
            help_behavior_hint="(default: the recipe's own, or digits)",
        ),
    ] = None
    out: Annotated[Path | None, arg(help="the run's folder", help_behavior_hint="(default: runs/RECIPE)")] = None
    recipe: Annotated[
        str | None,
        arg(help=f"complete settings by name: {', '.join(RECIPES)}", help_behavior_hint="(default: DATA's own, or images)"),
    ] = None
    size: Annotated[int | None, recipes_own("crop to the centre square and resize to this side, in pixels")] = None
    channels: Annotated[Literal[1, 3] | None, recipes_own("convert to grey (1) or RGB (3)")] = None
    network: Annotated[NetworkChoice | None, recipes_own("architecture of stage 1")] = None
    latent_dim: Annotated[int | None, recipes_own("number of latents")] = None
    balance: Annotated[str | None, recipes_own(f"balance of stage 1: {BALANCES}")] = None
    second_balance: Annotated[str | None, recipes_own("balance of stage 2, likewise")] = None
    objective: Annotated[str | None, recipes_own(f"what stage 1's loss is made of: {OBJECTIVES}")] = None
    epochs: Annotated[int | None, recipes_own("length of stage 1, passes over the training images")] = None
    second_epochs: Annotated[int | None, recipes_own("length of stage 2, passes over the training codes")] = None
    stages: Annotated[Literal[1, 2], arg(help="1 leaves out the second stage")] = 2
    batch_size: Annotated[int | None, recipes_own("images per step, both stages")] = None
    learning_rate: Annotated[float | None, recipes_own("Adam's, at the start of both stages")] = None
    ema_decay: Annotated[float | None, recipes_own("of a running average of the weights, used in their place, both stages")] = (
        None
    )
    precision: Annotated[Literal["float32", "bfloat16"] | None, recipes_own("of the networks' arithmetic, both stages")] = None
    seed: Annotated[int, arg(help="of weights, order and noise")] = 0
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"
    skip_unreadable: Annotated[bool, arg(help="leave out images that cannot be decoded, and list them")] = False
    save_seconds: Annotated[float, arg(help="time between checkpoints, seconds")] = 60.0
    engine: Annotated[EngineChoice, arg(help=ENGINES)] = "eager"
    tensorboard: Annotated[bool, arg(help="write TensorBoard files into the run's folder")] = False

    def settings(self) -> Recipe:
        """The recipe with what was given on the command line put in."""
        recipe = find_recipe(self.recipe or (None if self.data else "digits"), self.data)
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Changes)}
        return Changes(**values).apply(recipe)

    def run(self) -> None:
        recipe = self.settings()
        from poise import parallel
        from poise.balance import make_balance
        from poise.objectives import make_objective
        from poise.pipeline import Options, train
        from poise.report.tables import figures_table

        for stage in filter(None, (recipe.first, recipe.second)):
            make_balance(stage.balance, image_size=1, latent_dim=1)  # a wrong one is said before the data are read
        make_objective(recipe.first.objective)
        options = Options(self.device, self.save_seconds, self.tensorboard, engine=self.engine)
        run = train(self.data, recipe=recipe, out=self.out, options=options)
        if parallel.rank() > 0:
            return
        summary = json.loads((run.folder / "summary.json").read_text())
        show_table(
            f"{recipe.name}: {run.data['train']} training images, {run.data['test']} test images", figures_table(summary)
        )
        for note in [*run.data["notes"], *summary.get("notes", [])]:
            print(f"note: {note}")
        print(f"pictures: {run.folder}/samples.png, reconstructions.png, training.png")
        print(f"next: poise sample {run.folder} -n 64 --out grid.png; poise evaluate {run.folder}")


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained run. Image i of a seed is always the same, however many are drawn."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN", help="the folder that `poise train` wrote")]
    count: Annotated[int, arg(name="count", aliases=["-n"], help="number of images")] = 64
    out: Annotated[Path, arg(help="a .png (one grid), an .npz (array `images`, bytes), or a folder (one PNG per image)")] = (
        Path("samples.png")
    )
    prior: Annotated[
        PriorChoice | None,
        arg(help="normal (GEN-1), second-stage (GEN-2), or mixture", help_behavior_hint="(default: second-stage if trained)"),
    ] = None
    seed: Annotated[int, arg(help="any integer")] = 0
    first: Annotated[int, arg(help="number of the first image, to draw a set in parts")] = 0
    noise: Annotated[Switch | None, recipes_own("add stage 2's decoder noise to its latents")] = None
    renormalise: Annotated[Renormalise | None, recipes_own("scale latents to the variance law")] = None
    adjust_variance: Annotated[Switch | None, recipes_own("scale images to the real images' variance")] = None
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.progress import counted, progress
        from poise.writing import check_output, write_images

        check_output(self.out, self.count)
        generation: Generation = given(
            run.recipe.generation,
            second_stage_noise=self.noise and self.noise == "on",
            renormalise=self.renormalise,
            adjust_variance=self.adjust_variance and self.adjust_variance == "on",
        )
        chunks = run.sample_chunks(self.count, prior=self.prior, seed=self.seed, first=self.first, generation=generation)
        with progress("images", self.count) as display:
            write_images(counted(chunks, display), self.out, self.count, first=self.first)
        print(f"{self.count} images: {self.out}")


@dataclass(frozen=True)
class Encode:
    """Write the posterior of each image: arrays `mean` and `logvar` (log variance), one row per image, float32.

    Rows are in the order of the images: those of a folder sorted by path.
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN", help="the folder that `poise train` wrote")]
    images: Annotated[
        Positional[str | None],
        arg(help="a folder, an image file or an array", help_behavior_hint="(default: the run's test images)"),
    ] = None
    out: Annotated[Path, arg(help="an .npz or a .safetensors file")] = Path("codes.npz")
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.progress import counted, progress
        from poise.writing import check_codes_output, write_codes

        check_codes_output(self.out)
        images = images_for(run, self.images)
        chunks = run.encode_chunks(images)
        with progress("images", len(images)) as display:
            write_codes(counted(chunks, display), self.out, len(images))
        print(f"{len(images)} codes: {self.out}")


@dataclass(frozen=True)
class Reconstruct:
    """Show images beside their reconstructions."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN", help="the folder that `poise train` wrote")]
    images: Annotated[
        Positional[str | None],
        arg(help="a folder, an image file or an array", help_behavior_hint="(default: the run's test images)"),
    ] = None
    count: Annotated[int, arg(name="count", aliases=["-n"], help="number of images, at most")] = 32
    out: Annotated[Path, arg(help="a .png (pairs, original left), an .npz or a folder (reconstructions)")] = Path(
        "reconstructions.png"
    )
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.datasets import gather
        from poise.writing import check_output, write_images

        check_output(self.out)
        if self.count < 1:
            raise InputError(f"the number of images must be at least 1, not {self.count}")
        source = images_for(run, self.images)
        originals = gather(source, range(min(self.count, len(source))))
        restored = run.reconstruct(originals)
        shown = interleave(originals, restored) if self.out.suffix == ".png" else restored
        write_images([shown], self.out, len(shown), columns=8)
        error = float((originals - restored).square().mean())
        print(f"{len(originals)} images: {self.out}, MSE {error:.5f}")


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on its test images, or compare any two sets of images. Every number carries its protocol.

    A run: error, likelihood, latents, and how reconstructions and samples of each prior compare with real images (FID, KID,
    precision, recall, density, coverage). A table on a terminal, JSON into a file or a pipe; progress goes to stderr.
    """

    run_folder: Annotated[
        Positional[Path | None],
        arg(metavar="RUN", help="the folder that `poise train` wrote", help_behavior_hint="(or --real and --generated)"),
    ] = None
    real: Annotated[str | None, arg(help=f"real images: {ANY_IMAGES}", help_behavior_hint="(instead of a run)")] = None
    generated: Annotated[str | None, arg(help="images to compare with them, likewise", help_behavior_hint="")] = None
    size: Annotated[
        int | None, arg(help="crop both sets to squares and resize to this side, in pixels", help_behavior_hint="(as they are)")
    ] = None
    protocol: Annotated[
        str | None,
        arg(
            help=f"{', '.join(PROTOCOLS)}: see docs/metrics.md",
            help_behavior_hint="(default: default, of two sets every-image)",
        ),
    ] = None
    extractor: Annotated[
        str,
        arg(
            help="whose features are compared: inception (FID; downloaded once), light, dinov2, pixels, FILE.pt:range=-1..1; "
            "auto: inception if it is here, else light; none: no comparison"
        ),
    ] = "auto"
    infinity: Annotated[bool, arg(help="extrapolate Frechet distances to infinitely many images as well")] = False
    nll_samples: Annotated[int, arg(help="importance samples per image for the log likelihood; 0: not estimated")] = 0
    seed: Annotated[int, arg(help="of generated images")] = 0
    json: Annotated[bool, arg(help="JSON even on a terminal")] = False
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"

    def run(self) -> None:
        if self.run_folder is not None and (self.real or self.generated):
            raise InputError("give a run, or --real and --generated, not both")
        if self.run_folder is None and not (self.real and self.generated):
            raise InputError("give a run's folder, or two sets of images with --real and --generated")
        if self.run_folder is None:
            self._compare()
        else:
            self._measure(self.run_folder)

    def _compare(self) -> None:
        if self.nll_samples:
            raise InputError("--nll-samples needs a run: two sets of images have no likelihood")
        from poise.evaluation import evaluate

        evaluation = evaluate(
            self.real,
            self.generated,
            protocol=self.protocol or "every-image",
            extractor=self.extractor,
            size=self.size,
            infinity=self.infinity,
            device=self.device,
            quiet=False,
        )
        self._show(evaluation, f"{self.generated} against {self.real}")

    def _measure(self, folder: Path) -> None:
        if self.size is not None:
            raise InputError("--size is for --real and --generated: a run has its own")
        from poise.files import write_json

        run = load_run(folder, self.device)
        evaluation = run.evaluate(
            protocol=self.protocol or "default",
            extractor=self.extractor,
            infinity=self.infinity,
            nll_samples=self.nll_samples,
            seed=self.seed,
            quiet=False,
        )
        try:
            write_json(folder / "evaluation.json", evaluation.to_json())
        finally:  # a full disk takes nothing that was measured
            self._show(evaluation, f"{folder}: {evaluation.pages['reconstruction']['images']} images")
            if self._for_people:
                self._show_published(run)

    @property
    def _for_people(self) -> bool:
        return sys.stdout.isatty() and not self.json

    def _show(self, evaluation: "Evaluation", title: str) -> None:
        if not self._for_people:
            print(json.dumps(evaluation.to_json(), indent=2))
            return
        if evaluation.pages:
            from poise.report.tables import figures_table

            show_table(title, figures_table(evaluation.pages))
        compared = [m for m in evaluation.measurements if m.protocol.extractor != NO_EXTRACTOR]
        if compared:
            show_cells("" if evaluation.pages else title, table(compared, mixed=True))
        for protocol in {m.protocol.hash: m.protocol for m in evaluation.measurements}.values():
            print(f"protocol {protocol}")
        for note in evaluation.notes:
            print(f"note: {note}")

    def _show_published(self, run: "Run") -> None:
        recipe = RECIPES.get(run.recipe.name)
        if recipe is not None and recipe.data == run.recipe.data:
            for line in recipe.published:
                print(f"published: {line}")


@dataclass(frozen=True)
class Diagnose:
    """Say in plain words what is wrong with a run, with the figure behind each sentence and the one thing to try."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN", help="the folder that `poise train` wrote")]
    json: Annotated[bool, arg(help="print JSON instead of sentences")] = False
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.diagnosis import diagnose

        diagnosis = diagnose(run, quiet=False)
        print(json.dumps(diagnosis.to_json(), indent=2) if self.json else diagnosis)


@dataclass(frozen=True)
class Compare:
    """Train and measure several balances or models under the same conditions, with several seeds: one table, one page of plots.

    All labels have the images, network, order, noise, length and protocol in common; only stage 1's balance (or objective)
    differs. Run the same command again to go on after an interruption; what is finished is not done again.
    """

    data: Annotated[
        Positional[str | None],
        arg(help=ANY_IMAGES, help_behavior_hint="(default: the recipe's own, or digits)"),
    ] = None
    balances: Annotated[
        tuple[str, ...] | None,
        arg(
            help=f"balances of stage 1, the first is the reference: {BALANCES}",
            help_behavior_hint="(default: computed learned optimal fixed; beside models computed)",
        ),
    ] = None
    models: Annotated[
        tuple[str, ...], arg(help="objectives of stage 1: autoencoder, rae-l2, rae-gp, wae-mmd:weight=10, ...")
    ] = ()
    priors: Annotated[
        tuple[PriorChoice, ...] | None,
        arg(help="whose samples are compared; without second-stage no stage 2 is trained", help_behavior_hint="(default: all)"),
    ] = None
    seeds: Annotated[int, arg(help="number of seeds: 0, 1, ...")] = 3
    recipe: Annotated[
        str | None,
        arg(help=f"complete settings by name: {', '.join(RECIPES)}", help_behavior_hint="(default: DATA's own, or images)"),
    ] = None
    out: Annotated[Path | None, arg(help="the comparison's folder", help_behavior_hint="(default: runs/compare-DATA)")] = None
    second_balance: Annotated[str | None, recipes_own("balance of stage 2, for all labels; same: each balance label's own")] = (
        None
    )
    size: Annotated[int | None, recipes_own("crop to the centre square and resize to this side, in pixels")] = None
    network: Annotated[NetworkChoice | None, recipes_own("architecture of stage 1")] = None
    latent_dim: Annotated[int | None, recipes_own("number of latents")] = None
    epochs: Annotated[int | None, recipes_own("length of stage 1, passes over the training images")] = None
    second_epochs: Annotated[int | None, recipes_own("length of stage 2, passes over the training codes")] = None
    stages: Annotated[Literal[1, 2], arg(help="1 leaves out the second stage")] = 2
    batch_size: Annotated[int | None, recipes_own("images per step, both stages")] = None
    learning_rate: Annotated[float | None, recipes_own("Adam's, at the start of both stages")] = None
    protocol: Annotated[str, arg(help=f"{', '.join(PROTOCOLS)}: see docs/metrics.md")] = "default"
    images: Annotated[
        int | None, arg(help="real images to compare with as many others", help_behavior_hint="(default: the protocol's)")
    ] = None
    extractor: Annotated[
        str,
        arg(
            help="see poise evaluate; auto: pixels for images of at most 16x16, else the first of inception, light and pixels "
            "that is here"
        ),
    ] = "auto"
    jobs: Annotated[
        int | None,
        arg(help="runs at the same time", help_behavior_hint="(default: cores of the CPU; on cuda one for each GPU)"),
    ] = None
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"
    engine: Annotated[EngineChoice, arg(help=ENGINES)] = "eager"
    save_seconds: Annotated[float, arg(help="time between checkpoints, seconds")] = 60.0

    def run(self) -> None:
        own = ("data", "device", "engine", "save_seconds", "stages")
        chosen: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        chosen |= {"stages": 1} if self.stages == 1 else {}
        from poise.comparison import compare
        from poise.pipeline import Options

        options = Options(self.device, self.save_seconds, engine=self.engine)
        comparison = compare(self.data, options=options, **chosen)
        print(comparison)
        page = f"; page: {write_page(comparison, self.device)}" if comparison.results else ""
        print(f"table: {comparison.folder}/table.md{page}; runs: {comparison.folder}/LABEL-SEED")
        fail_if_any(comparison)


@dataclass(frozen=True)
class Reproduce:
    """Do a published experiment: both stages, all ways to sample, each protocol it was scored under, beside published numbers.

    Run the same command again to go on after an interruption, or after --minutes.
    """

    name: Annotated[Positional[str], arg(metavar="NAME", help=", ".join(EXPERIMENTS))]
    data: Annotated[
        str | None, arg(help="where its images are, if not in ./data or POISE_DATA", help_behavior_hint="(default: by name)")
    ] = None
    balances: Annotated[
        tuple[str, ...] | None,
        arg(help="balances of stage 1, for instance computed learned optimal", help_behavior_hint=RECIPES_OWN),
    ] = None
    seeds: Annotated[int, arg(help="number of seeds: 0, 1, ...")] = 1
    length: Annotated[float, arg(help="share of the full length, for a trial; its label says so")] = 1.0
    minutes: Annotated[float | None, arg(help="stop after so many, with all saved", help_behavior_hint="(default: never)")] = (
        None
    )
    out: Annotated[Path | None, arg(help="folder of the runs", help_behavior_hint="(default: runs/reproduce-NAME)")] = None
    results: Annotated[Path, arg(help="folder of the results, one JSON a run")] = Path("results")
    extractor: Annotated[str, arg(help="see poise evaluate")] = "auto"
    jobs: Annotated[
        int | None,
        arg(help="runs at the same time", help_behavior_hint="(default: cores of the CPU; on cuda one for each GPU)"),
    ] = None
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"
    engine: Annotated[EngineChoice, arg(help=ENGINES)] = "eager"

    def run(self) -> None:
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "device", "engine")}
        from poise.pipeline import Options
        from poise.reproduction import reproduce, text

        comparison = reproduce(self.name, options=Options(self.device, engine=self.engine), **chosen)
        if comparison.results or comparison.failed:
            print(text(comparison))
            print(f"results: {self.results}/{self.name}-LABEL-SEED.json; runs: {comparison.folder}")
        if comparison.late:
            print(f"stopped after {self.minutes:g} minutes; run the same command again to go on")
        fail_if_any(comparison)


def write_page(comparison: "Comparison", device: str) -> Path:
    """The comparison's page of plots."""
    from poise.report import write_report

    return write_report([comparison.folder], comparison.folder / "report.html", device=device, quiet=False)


def fail_if_any(comparison: "Comparison") -> None:
    """Raises RunError where a run has failed."""
    if comparison.failed:
        count = len(comparison.failed)
        raise RunError(f"{count} of {count + len(comparison.results)} runs failed: see the end of the table")


@dataclass(frozen=True)
class Report:
    """Write one HTML page about runs: curves, images, latents, diagnosis, numbers with their protocols, settings.

    The page is complete in itself and loads nothing: send it, or print it.
    """

    folders: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="PATHS...",
            help="folders of runs, or of comparisons: the runs that lie in a folder",
            help_behavior_hint="(one or more)",
        ),
    ]
    out: Annotated[Path, arg(help="the page, an .html file")] = Path("report.html")
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")] = "auto"

    def run(self) -> None:
        from poise.report import write_report

        out = write_report(self.folders, self.out, device=self.device, quiet=False)
        print(f"report: {out}")


COMMANDS = {
    "train": Train,
    "sample": Sample,
    "encode": Encode,
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "diagnose": Diagnose,
    "compare": Compare,
    "reproduce": Reproduce,
    "report": Report,
}


def main() -> None:
    """Run the command that the arguments name, and exit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other: half-written files go
    try:
        parse(sys.argv[1:]).run()
    except InputError as error:
        fail(str(error), 2)
    except Interrupted as error:
        fail(str(error), 130, prefix="poise: ")
    except RunError as error:
        fail(str(error), 1)
    except BrokenPipeError:
        os._exit(0)  # the reader of stdout has gone, as `head` does
    except OSError as error:
        fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        fail(f"not enough memory: {error}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def parse(arguments: list[str]) -> Any:
    """The command with its options. A wrong option is one line on stderr and exit code 2."""
    if arguments == ["--version"]:
        print(f"poise {version('poise')}")
        sys.exit()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="poise", description=DESCRIPTION)
    except SystemExit as exit:
        if exit.code:
            name = f"poise {arguments[0]}" if arguments and arguments[0] in COMMANDS else "poise"
            fail(f"{one_line(complaint.getvalue())} (see {name} --help)", 2)
        raise


def one_line(box: str) -> str:
    """The message inside the box that the parser draws, on one line, without the colours it has on a terminal."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╰─╮╯ ") for line in plain.splitlines()[1:]]
    end = next((k for k, line in enumerate(lines) if not line), len(lines))
    return " ".join(lines[:end]) or plain.strip()


def fail(message: str, code: int, prefix: str = "poise: error: ") -> NoReturn:
    """One line on stderr, and exit. Of several processes, those after the first give their number."""
    number = os.environ.get("RANK", "0")
    prefix += f"process {number}: " if number != "0" else ""
    print(prefix + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def load_run(folder: Path, device: str) -> "Run":
    """A run, with its warnings said."""
    from poise.run import load

    run = load(folder, device=device)
    for line in run.warnings:
        print(f"poise: warning: {line}; using the one before", file=sys.stderr)
    if not run.finished:
        untrained = run.recipe.second is not None and run.second is None
        without = ", and stage 2 has not begun: the prior is normal unless you choose" if untrained else ""
        print(f"poise: warning: {folder} is not finished{without}", file=sys.stderr)
    return run


def images_for(run: "Run", source: str | None) -> Any:
    """Images of a source in the form that a run takes; by default its test images."""
    from poise.datasets import read_images

    channels, size, _ = run.data["shape"]
    return run.test_images() if source is None else read_images(source, size=size, channels=channels)


def interleave(left: Any, right: Any) -> Any:
    """left[0], right[0], left[1], right[1], ..."""
    import torch

    return torch.stack([left, right], 1).flatten(0, 1)


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(escape(name), value)
    Console().print(table)


def show_cells(title: str, rows: list[list[str]]) -> None:
    """A table with a head on stdout, whole even where the terminal is too narrow for it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    head, *body = rows
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(escape(name), justify="right" if name else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(escape, row))
    Console(width=max(Console().width, WHOLE_TABLE)).print(table)
