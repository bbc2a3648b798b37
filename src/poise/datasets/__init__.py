"""Names, folders, arrays and Hub ids -> images to train on and to test on, which never overlap, with a checksum.

In reading order: `storage` (arrays larger than memory), `dataset` (the split rule), `arrays` (.npy, .npz), `encoded` (image
files), `folders`, `layouts` (torchvision's folders), `hub`, `names` (MNIST and its like), `loading` (the door).
"""

from poise.datasets.dataset import Dataset
from poise.datasets.loading import find_images, load, read_images
from poise.datasets.names import NAMES
from poise.datasets.storage import Rows, gather, head

__all__ = ["NAMES", "Dataset", "Rows", "find_images", "gather", "head", "load", "read_images"]
