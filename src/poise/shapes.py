"""Tensor shapes as types, for all public signatures.

In the test suite these names are jaxtyping annotations. The pytest hook imports jaxtyping before
this package, and checks every call. Otherwise the names are plain `Tensor`: `import poise` needs
torch and numpy only, and so do checkers of the types of other packages.

Conventions. Images are NCHW, float, in [0, 1]. Only data sets and files hold bytes (uint8). A value
per image is summed over all dimensions of the image, never averaged.
"""

import sys
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if not TYPE_CHECKING and "jaxtyping" in sys.modules:
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
    Images: TypeAlias = Tensor
    ByteImages: TypeAlias = Tensor
    Values: TypeAlias = Tensor
    Batch: TypeAlias = Tensor
    Latents: TypeAlias = Tensor
    Noise: TypeAlias = Tensor
    PerImage: TypeAlias = Tensor
    ClassOfEach: TypeAlias = Tensor
    PerLatent: TypeAlias = Tensor
    Scalar: TypeAlias = Tensor
    Features: TypeAlias = Tensor
