"""`poise sample`, `encode`, `reconstruct` and `interpolate`: write images and codes to files."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from poise.cli.options import (
    RECIPES_OWN,
    Device,
    Images,
    PriorChoice,
    ReadingGroup,
    ReadingOptions,
    RunFolder,
    refuse_reading,
)
from poise.cli.showing import load_run, print_notes
from poise.errors import InputError, RunError
from poise.recipes.settings import Generation, Renormalise, Solver, given
from poise.variants import PRIORS

if TYPE_CHECKING:
    from poise.data import Given
    from poise.runs.run import Run

Switch = Literal["on", "off"]


def of_recipe(text: str) -> Any:
    """Return the help of an option whose default is the recipe's value."""
    return arg(help=text, help_behavior_hint=RECIPES_OWN)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained run. Image i of a seed does not depend on the number of images."""

    run_folder: RunFolder
    count: Annotated[int, arg(name="count", aliases=["-n"], help="number of images")] = 64
    out: Annotated[
        Path,
        arg(
            help="a .png (one grid), an .npz (uint8 array `images`) or a folder (one PNG per image)"
        ),
    ] = Path("samples.png")
    prior: Annotated[
        PriorChoice | None,
        arg(
            help=", ".join(f"{name} ({prior.label})" for name, prior in PRIORS.items()),
            help_behavior_hint="(default: second-stage or flow if trained, else normal)",
        ),
    ] = None
    label: Annotated[
        str | None,
        arg(
            help="a class of a run that was trained with --labels: images of this class",
            help_behavior_hint="(default: all classes, by their frequency)",
        ),
    ] = None
    guidance: Annotated[
        float | None,
        of_recipe("of a flow with labels: more than 1 gives more typical and less diverse images"),
    ] = None
    seed: Annotated[int, arg(help="any integer")] = 0
    first: Annotated[int, arg(help="number of the first image, to draw a set in several calls")] = 0
    noise: Annotated[
        Switch | None, of_recipe("add stage 2's decoder noise to the latents it generates")
    ] = None
    flow_steps: Annotated[int | None, of_recipe("number of steps of the flow's solver")] = None
    flow_solver: Annotated[
        Solver | None,
        of_recipe("n steps of heun evaluate the flow 2n - 1 times, n steps of euler n times"),
    ] = None
    renormalise: Annotated[Renormalise | None, of_recipe("scale latents to the variance law")] = (
        None
    )
    adjust_variance: Annotated[
        Switch | None, of_recipe("scale images to the variance of the real images")
    ] = None
    device: Device = "auto"

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.runs.export import check_output, write_images
        from poise.support.progress import counted, progress

        check_output(self.out, self.count)
        used = self.prior or run.default_prior
        for prior, options in (
            ("flow", {"--flow-steps": self.flow_steps, "--flow-solver": self.flow_solver}),
            ("second-stage", {"--noise": self.noise}),
        ):
            given_here = [name for name, value in options.items() if value is not None]
            if given_here and used != prior:
                raise InputError(
                    f"{' and '.join(given_here)}: for the prior {prior}, and this is {used}; "
                    "leave it out"
                )
        generation: Generation = given(
            run.recipe.generation,
            second_stage_noise=self.noise and self.noise == "on",
            flow_solver=self.flow_solver,
            flow_steps=self.flow_steps,
            renormalise=self.renormalise,
            adjust_variance=self.adjust_variance and self.adjust_variance == "on",
        )
        chunks = run.sample_chunks(
            self.count,
            prior=self.prior,
            seed=self.seed,
            first=self.first,
            generation=generation,
            label=self.label,
            guidance=self.guidance,
        )
        with progress("images", self.count) as display:
            write_images(counted(chunks, display), self.out, self.count, first=self.first)
        of_class = "" if self.label is None else f" of class {self.label}"
        print(f"{_images(self.count)}{of_class} from prior {used}: {self.out}")
        if run.classes and self.label is None:
            print(f"note: all {len(run.classes)} classes, by their frequency; --label chooses one")
        self._print_best_prior(run, used)

    def _print_best_prior(self, run: "Run", used: str) -> None:
        distances = run.prior_distances()
        if distances is None and (run.deterministic or run.data["source"] == "array"):
            return  # `poise diagnose` does not work for this run
        if distances is None:
            where = shlex.quote(str(self.run_folder))
            print(
                f"note: poise diagnose {where} finds the prior whose samples are nearest "
                "to the images"
            )
            return
        if not distances:
            return
        best = next(iter(distances))
        listed = ", ".join(f"{name} {distance:.2f}" for name, distance in distances.items())
        as_good = distances.get(used, float("inf")) - distances[best] < 0.01  # equal as shown
        advice = "" if as_good else f": try --prior {best}"
        print(
            f"note: poise diagnose found {best} best (distance from the images: {listed}){advice}"
        )


@dataclass(frozen=True)
class Encode:
    """Write the posterior of each image to a file.

    The file has two float32 arrays with one row per image: `mean` and `logvar` (log variance). All
    images of a folder are encoded, sorted by path. `names` and `sides` say which image a row is:
    the path inside the folder, and train, test or val. If the run was trained with labels and the
    images have some, `labels` holds the class of each row. `latents_mean`, `latents_std`,
    `shift_factor` and `scaling_factor` standardise latents for a diffusion model: per channel, or
    all alike, of the training images. In a .safetensors file all these are metadata.
    """

    run_folder: RunFolder
    images: Images = None
    out: Annotated[Path, arg(help="an .npz or a .safetensors file")] = Path("codes.npz")
    device: Device = "auto"
    reading: ReadingGroup = field(default_factory=ReadingOptions)

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.runs.export import check_codes_output, write_codes
        from poise.support.progress import counted, progress, warn

        check_codes_output(self.out)
        given = images_for(run, self.images, self.reading)
        number = len(given.images)
        chunks = run.encode_chunks(given.images)
        try:
            scale = run.latent_scale if run.has_codes else None
        except RunError as error:  # the training codes are damaged, the encoder is not
            warn(f"{error}; the scale of latents is left out")
            scale = None
        with progress("images", number) as display:
            told = given.names, given.sides, scale, given.labels
            write_codes(counted(chunks, display), self.out, number, *told)
        print(f"{number} code{'s' * (number != 1)}{_by_side(given.sides)}: {self.out}")
        if scale:
            print(
                f"for a diffusion model: shift_factor {scale.shift_factor:.4g}, scaling_factor "
                f"{scale.scaling_factor:.4g}, of latents {'x'.join(map(str, scale.latent_shape))}"
            )
        print_notes(given.notes)


@dataclass(frozen=True)
class Reconstruct:
    """Show images beside their reconstructions.

    If there are more than --count images, a fixed seed draws --count of them.
    """

    run_folder: RunFolder
    images: Images = None
    count: Annotated[
        int,
        arg(name="count", aliases=["-n"], help="maximum number of images"),
    ] = 32
    out: Annotated[
        Path,
        arg(
            help="a .png (pairs, original on the left), an .npz or a folder (reconstructions only)"
        ),
    ] = Path("reconstructions.png")
    device: Device = "auto"
    reading: ReadingGroup = field(default_factory=ReadingOptions)

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.data import gather
        from poise.runs.export import check_output, write_images
        from poise.support.seeds import drawn

        check_output(self.out)
        if self.count < 1:
            raise InputError(f"the number of images must be at least 1, not {self.count}")
        given = images_for(run, self.images, self.reading)
        rows = drawn(len(given.images), self.count)
        originals = gather(given.images, rows)
        restored = run.reconstruct(originals)
        shown = interleave(originals, restored) if self.out.suffix == ".png" else restored
        write_images([shown], self.out, len(shown), columns=8)
        error = float((originals - restored).square().mean())
        sides = _by_side([given.sides[row] for row in rows] if given.sides else [])
        print(f"{_images(len(originals))}{sides}: {self.out}, MSE {error:.5f}")
        print_notes(given.notes)


@dataclass(frozen=True)
class Interpolate:
    """Interpolate between two pictures in the latent space of a run.

    The pictures are cropped and resized as the run's images were, and encoded. The points between
    their codes, on an arc about 0, are decoded.
    """

    run_folder: RunFolder
    start: Annotated[Positional[Path], arg(metavar="A", help="an image file: the first picture")]
    end: Annotated[Positional[Path], arg(metavar="B", help="an image file: the last picture")]
    steps: Annotated[int, arg(help="number of images, from the first picture to the last")] = 16
    out: Annotated[
        Path, arg(help="a .png (all images in a row) or a .gif (an animation, there and back)")
    ] = Path("interpolation.png")
    device: Device = "auto"

    def run(self) -> None:
        if self.out.suffix not in (".png", ".gif"):
            raise InputError(f"{self.out}: give a .png (a row of images) or a .gif (an animation)")
        run = load_run(self.run_folder, self.device)
        from poise.data.decoding import grid, save_png, to_gif
        from poise.support.files import write_file

        a, b = (picture_for(run, path) for path in (self.start, self.end))
        images = run.interpolate(a, b, self.steps)
        if self.out.suffix == ".gif":
            write_file(self.out, to_gif(images))
        else:
            save_png(self.out, grid(images, columns=len(images)))
        print(f"{_images(self.steps)} from {self.start} to {self.end}: {self.out}")


def picture_for(run: "Run", path: Path) -> Any:
    """Return the picture of a file, (channels, size, size), prepared as the run's images were.

    Raises:
        InputError: the file cannot be read, or has fewer pixels than the run's images.
    """
    import numpy as np
    import torch

    from poise.data.decoding import (
        ALIGNED,
        crop_and_resize,
        jpeg_round_trip,
        read_header,
        read_image,
        square_resize,
    )

    channels, size, _ = run.data["shape"]
    width, height, _ = read_header(path)
    if min(width, height) < size:
        raise InputError(
            f"{path} has {width}x{height} pixels, and the run's images have {size}x{size}: "
            "give a larger picture"
        )
    picture = read_image(path, "L" if channels == 1 else "RGB", levels=run.levels)
    aligned = _is_celeba(run) and picture.size == ALIGNED
    picture = (crop_and_resize if aligned else square_resize)(picture, size=size)
    pixels = torch.from_numpy(np.array(picture)).reshape(1, size, size, channels)
    quality = run.recipe.data.jpeg_quality
    image = pixels.permute(0, 3, 1, 2)
    return (image if quality is None else jpeg_round_trip(image, quality))[0]


def _is_celeba(run: "Run") -> bool:
    from poise.data.layouts import is_celeba

    return is_celeba(run.recipe.data.source, run.data.get("name", ""))


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def images_for(run: "Run", source: str | None, reading: ReadingOptions) -> "Given":
    """Return all images of a source in the run's size, channels and levels.

    None: the run's test images, without names.
    """
    from poise.data import Given, find_images

    if source is None:
        refuse_reading(reading, "images that you give")
        return Given(run.test_images(), "test", (), (), ())
    from poise.evaluation import through_jpeg

    channels, size, _ = run.data["shape"]
    if reading.levels is None:
        reading = replace(reading, levels=run.levels)
    how = asdict(reading) | {"labels": bool(run.classes)}
    crop = "aligned" if _is_celeba(run) else "square"
    found = find_images(source, size=size, channels=channels, side="all", crop=crop, **how)
    quality = run.recipe.data.jpeg_quality
    return found if quality is None else found._replace(images=through_jpeg(found.images, quality))


def _by_side(sides: Sequence[str]) -> str:
    """Return the number of images of each side; an empty text if there are no sides."""
    numbers = Counter(sides)
    if not any(numbers):
        return ""
    listed = ", ".join(f"{number:,} {side or 'other'}" for side, number in numbers.items())
    return f" ({listed})"


def interleave(left: Any, right: Any) -> Any:
    """Return left[0], right[0], left[1], right[1], ..."""
    import torch

    return torch.stack([left, right], 1).flatten(0, 1)
