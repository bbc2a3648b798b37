"""Compute the features of images that metrics compare.

In reading order:

    extractor     the class `Extractor`, and extraction in batches
    making        make an extractor from its name
    inception     the network of the FID, and networks in files
    fingerprint   recognise the 2015 Inception
    light, dinov2, pixels   other extractors
    resize, prepared        resize and scale images before a network
    weights       read files of weights
    cache         keep features on disk
"""

from poise.features.cache import cached_features
from poise.features.extractor import Extractor, extract
from poise.features.inception import available_inception, inception
from poise.features.making import make_extractor

__all__ = [
    "Extractor",
    "available_inception",
    "cached_features",
    "extract",
    "inception",
    "make_extractor",
]
