"""`poise export` and `explore`: take a run to other programs, and to a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from poise.cli.options import PriorChoice, RunFolder
from poise.cli.showing import load_run, print_notes, show_cells

Priors = Annotated[
    tuple[PriorChoice, ...] | None,
    arg(
        metavar="NAME [NAME ...]",
        help="priors to include",
        help_behavior_hint="(default: all that the run has)",
    ),
]


@dataclass(frozen=True)
class Export:
    """Write the encoder, the decoder and the priors of a run as ONNX files.

    Each file holds its weights and takes any number of images. Before it is written, its results in
    onnxruntime are compared with PyTorch's.
    """

    run_folder: RunFolder
    format: Annotated[Literal["onnx"], arg(help="format of the files")] = "onnx"
    out: Annotated[Path, arg(help="folder of the files")] = Path("onnx")
    priors: Priors = None

    def run(self) -> None:
        run = load_run(self.run_folder, "cpu")
        from poise.runs.onnx_files import export_onnx

        written, notes = export_onnx(run, self.out, priors=self.priors)
        rows = [
            [file.path.name, f"{file.size / 1e6:.2f}", f"{file.difference:.1e}"] for file in written
        ]
        show_cells("", [["", "MB", "difference from PyTorch"], *rows])
        print_notes(notes)
        print(f"folder: {self.out}")


@dataclass(frozen=True)
class Explore:
    """Write an HTML page that runs the model in a browser.

    The page needs no server and no network access. It has sliders along directions of latent space,
    samples of each prior by seed, the path between two images, the reconstruction of an image of
    your own, and a map of the codes.
    """

    run_folder: RunFolder
    out: Annotated[Path, arg(help="the page, an .html file")] = Path("explore.html")
    priors: Priors = None
    pictures: Annotated[int, arg(help="largest number of test images on the page")] = 240

    def run(self) -> None:
        run = load_run(self.run_folder, "cpu")
        from poise.explore import write_page

        out = write_page(run, self.out, priors=self.priors, pictures=self.pictures)
        print(f"page: {out}, {out.stat().st_size / 1e6:.2f} MB")
