"""Numbers: how well a model reconstructs, how likely it finds images, how its samples compare, what its latents do.

Statistics are float64. Nothing here depends on the batch size or the order of images.
"""

from poise.metrics.distances import frechet_distance
from poise.metrics.encoding import CHUNK, encode_all, pixel_std
from poise.metrics.latents import LatentStatistics, latent_statistics
from poise.metrics.reconstruction import Reconstruction, reconstruction

__all__ = [
    "CHUNK",
    "LatentStatistics",
    "Reconstruction",
    "encode_all",
    "frechet_distance",
    "latent_statistics",
    "pixel_std",
    "reconstruction",
]
