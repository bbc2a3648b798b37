"""Names, folders, arrays and Hub ids -> images to train on and to test on, which never overlap, with a checksum.

In reading order: `storage` (arrays larger than memory), `dataset` (the split rule), `arrays` (.npy, .npz), `encoded` (image
files), `folders`, `layouts` (torchvision's folders), `hub`, `names` (MNIST and its like), `loading` (the door).
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
