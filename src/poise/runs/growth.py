"""Draw progress.png: fixed samples and reconstructions at each tenth of training, row by row.

Stage 1 adds rows of samples from N(0, I) and of reconstructions of test images. Stage 2 adds rows
of samples from the prior that it trains. The noise and the test images are the same in all rows.

The picture is its own record. A resumed run reads it, keeps the rows up to its checkpoint and adds
the others again. So it ends with the same picture as a run without interruption.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from poise.data.decoding import SEPARATOR_PIXELS, grid, read_image, to_png
from poise.errors import InputError, RunError
from poise.priors import Prior
from poise.shapes import Images
from poise.support.files import write_file
from poise.support.kernels import kernels
from poise.support.progress import warn
from poise.support.seeds import noise_per_image
from poise.support.snapshots import evaluating
from poise.vae import VAE

COLUMNS = 8  # samples and reconstructions in a row of stage 1; stage 2 has twice as many samples
LARGEST_TILE = 128  # pixels; larger images are reduced
LABEL, HEADING, GAP = 48, 24, 12  # pixels: width of the labels, height of headings, space between
FLOW_STEPS = (
    5  # at most: with 25, a row of a flow of maps cost 8 of its training steps (2026-11-26)
)
EFFORT = 1  # PNG compression level: the picture is written up to 20 times
SHARE_OF_TIME = 0.01  # writing takes at most this share of the time between two writes


class ProgressPicture:
    """The picture of a run in training.

    Args:
        path: of the PNG file.
        images: test images, (n, channels, height, width), float in [0, 1]. The first 8 are shown.
        seed: seed of the samples' noise. Row i of it is that of image i of `poise sample --seed`.
        priors: prior of each stage in words, for the headings.
        shown: stage and tenth of the last row to keep from an existing file. None: keep no rows.
        skipped: number of tenths of stage 1, at its start, that get no row, because a shorter
            training took them.
    """

    def __init__(
        self,
        path: Path,
        images: Images,
        *,
        seed: int,
        priors: Sequence[str],
        shown: tuple[int, int] | None = None,
        skipped: int = 0,
    ) -> None:
        self.path, self._images, self._seed = path, images[:COLUMNS], seed
        self._height, self._width = (
            side + SEPARATOR_PIXELS for side in _row(self._images[:1]).shape[:2]
        )
        self._skipped = skipped
        self._right = LABEL + COLUMNS * self._width + GAP
        size = self._top(len(priors), 10) + self._height, self._right + COLUMNS * self._width
        self._canvas = np.full((*size, images.shape[1]), 255, np.uint8)
        self._bottom = 0
        if shown is not None:
            self._restore(self._top(*shown) + self._height)
        firsts = [(1, skipped), (2, 1)][: len(priors)]
        tops = [self._top(*first) - HEADING for first in firsts]
        self._headings = [("test images, then their reconstructions", 0, self._right)] + [
            (f"stage {stage}: samples from {prior}", top, LABEL)
            for stage, (prior, top) in enumerate(zip(priors, tops, strict=True), 1)
        ]
        self._paste(_row(self._images), HEADING, self._right)
        self._changed, self._warned = False, False
        self._written, self._writing_seconds = time.monotonic(), 0.0

    def _top(self, stage: int, tenth: int) -> int:
        """Return the first line of a row. Row 0 of stage 1 shows the test images."""
        of_first = HEADING + GAP + (10 - self._skipped) * self._height
        row = tenth - self._skipped if stage == 1 else tenth
        return HEADING + row * self._height + (stage - 1) * of_first

    def _restore(self, bottom: int) -> None:
        """Read the file, if it is intact, and keep the lines above `bottom`."""
        with suppress(InputError):
            kept = read_image(self.path, "L" if self._canvas.shape[2] == 1 else "RGB")
            pixels = np.asarray(kept).reshape(kept.height, kept.width, -1)[:bottom]
            if pixels.shape[1] == self._canvas.shape[1]:
                self._paste(pixels, 0, 0)

    def add(self, stage: int, tenth: int, vae: VAE, prior: Prior) -> Images:
        """Add the row of a tenth of a stage, and write the file if that takes little time.

        Does not change the networks, their modes or torch's global generators. NaN is drawn black.

        Args:
            stage: 1 or 2.
            tenth: 1 to 10.
            vae: the VAE of stage 1.
            prior: the prior that the stage trains.

        Returns:
            The samples of the row, (8, channels, height, width), or 16 in stage 2.
        """
        device = next(vae.parameters()).device
        count = COLUMNS if stage == 1 else 2 * COLUMNS
        noise = noise_per_image(count, prior.noise_dims, self._seed).to(device)
        with torch.no_grad(), evaluating(vae, prior), kernels(device, tf32=False):
            left = vae.decode(prior.latents(noise))
            right = vae.reconstruct(self._images.to(device)) if stage == 1 else left[COLUMNS:]
        top = self._top(stage, tenth)
        while self._headings:  # not before the first row: Pillow is slow to import
            self._write_words(*self._headings.pop())
        self._write_words(f"{10 * tenth} %", top + self._height // 2 - HEADING // 2, 0)
        self._paste(_row(left[:COLUMNS]), top, LABEL)
        self._paste(_row(right), top, self._right)
        self._bottom, self._changed = top + self._height, True
        if time.monotonic() - self._written >= self._writing_seconds / SHARE_OF_TIME:
            self.write()
        return left

    def write(self) -> None:
        """Write the rows so far, if any are new.

        If the disk fails, print one warning. The next call tries again.
        """
        if not self._changed:
            return
        began = time.monotonic()
        try:
            write_file(self.path, to_png(self._canvas[: self._bottom], effort=EFFORT))
            self._changed = False
        except RunError as error:
            if not self._warned:
                warn(f"{error}; training goes on")
            self._warned = True
        self._written = time.monotonic()
        self._writing_seconds = self._written - began

    def _paste(self, pixels: np.ndarray, top: int, left: int) -> None:
        height, width = pixels.shape[:2]
        self._canvas[top : top + height, left : left + width] = pixels

    def _write_words(self, words: str, top: int, left: int) -> None:
        from PIL import Image, ImageDraw, ImageFont

        width = LABEL if left == 0 else COLUMNS * self._width
        strip = Image.new("L", (width, HEADING), 255)
        ImageDraw.Draw(strip).text((2, 4), words, fill=70, font=ImageFont.load_default(13))
        self._paste(np.asarray(strip)[:, :, None], top, left)


def _row(images: Images) -> np.ndarray:
    """Return images side by side, as bytes (height, width, channels)."""
    side = max(images.shape[2:])
    if side > LARGEST_TILE:
        height, width = (max(1, round(one * LARGEST_TILE / side)) for one in images.shape[2:])
        images = F.adaptive_avg_pool2d(images, (height, width))
    return grid(images.float().nan_to_num(nan=0.0), columns=len(images))
