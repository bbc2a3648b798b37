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

from poise.features.cache import CACHE_VARIABLE, cached_features, default_cache
from poise.features.extractor import EXTRACTION_BATCH, Extractor, extract
from poise.features.inception import WEIGHTS_VARIABLE, available_inception, inception
from poise.features.making import make_extractor

__all__ = [
    "CACHE_VARIABLE",
    "EXTRACTION_BATCH",
    "WEIGHTS_VARIABLE",
    "Extractor",
    "available_inception",
    "cached_features",
    "default_cache",
    "extract",
    "inception",
    "make_extractor",
]
