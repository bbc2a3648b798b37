"""Tensor shapes as types, for all public signatures.

For type checkers and in the test suite these names are jaxtyping annotations. The pytest hook
imports jaxtyping before this package, and checks every call. Otherwise the names are plain
`Tensor`, so that `import poise` needs torch and numpy only.

Conventions. Images are NCHW, float, in [0, 1]. Only data sets and files hold bytes (uint8). A value
per image is summed over all dimensions of the image, never averaged.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Int64, UInt8

    Images = Float[Tensor, "batch channels height width"]
    ByteImages = UInt8[Tensor, "batch channels height width"]
    # Images, vectors, sequences: anything with a batch dimension first.
    Values = Float[Tensor, "batch *dims"]
    # As `Values`, but arguments of one call may differ in all dimensions but the first.
    Batch = Float[Tensor, "batch ..."]
    Latents = Float[Tensor, "batch latents"]
    Noise = Float[Tensor, "batch noise"]
    PerImage = Float[Tensor, " batch"]
    ClassOfEach = Int64[Tensor, " batch"]
    PerLatent = Float[Tensor, " latents"]
    Scalar = Float[Tensor, ""]
    # The number of features is the same for all arguments of a call; the number of samples is not.
    Features = Float[Tensor, "_ features"]
else:
    Images = ByteImages = Values = Batch = Latents = Noise = Tensor
    PerImage = ClassOfEach = PerLatent = Scalar = Features = Tensor
