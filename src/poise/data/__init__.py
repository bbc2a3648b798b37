"""Load images from a name, a folder, an array or a Hub id, and split them into train and test.

The two sides never share an image. A data set has a checksum of its images.

In reading order: `decoding` (pixels and pictures), `storage` (arrays larger than memory), `dataset`
(the split rule), `arrays` (.npy, .npz), `encoded` (image files), `folders`, `layouts` (folders of
torchvision), `hub` (Hugging Face), `names` (MNIST and others), `loading` (`load`, for all sources).
"""

from poise.data.dataset import Dataset
from poise.data.loading import checked_images, find_images, load, read_images
from poise.data.storage import Rows, gather, head

__all__ = [
    "Dataset",
    "Rows",
    "checked_images",
    "find_images",
    "gather",
    "head",
    "load",
    "read_images",
]
