"""Feature extractors, which metrics compare images by, and the loop that runs them.

In reading order: `extractor` (what one is, and extraction in batches), `making` (one by its name), `inception` (and networks in
files), `fingerprint` (what the 2015 Inception is told by), `light`, `dinov2`, `pixels`; `resize`, `prepared` (resize and scale
before a network), `files` (weights); `cache` (features kept on disk).
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
