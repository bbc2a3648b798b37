"""Shapes as types: the names that every public signature uses.

The names are jaxtyping annotations for type checkers, and for the test suite, whose pytest hook imports jaxtyping before
this package and checks every call. Otherwise they are plain `Tensor`, so that `import poise` needs torch and numpy only.

Conventions: images are NCHW float in [0, 1]; bytes (uint8) live only in data sets and files. A per-image value is summed
over all dimensions of that image, never averaged.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, UInt8

    Images = Float[Tensor, "batch channels height width"]
    ByteImages = UInt8[Tensor, "batch channels height width"]
    Values = Float[
        Tensor, "batch *dims"
    ]  # images, vectors, sequences: anything with a batch dimension first
    Latents = Float[Tensor, "batch latents"]
    Noise = Float[Tensor, "batch noise"]
    PerImage = Float[Tensor, " batch"]
    PerLatent = Float[Tensor, " latents"]
    Scalar = Float[Tensor, ""]
    Features = Float[
        Tensor, "_ features"
    ]  # any number of samples, but one number of features in a call
else:
    Images = ByteImages = Values = Latents = Noise = PerImage = PerLatent = Scalar = Features = (
        Tensor
    )
