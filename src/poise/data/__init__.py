"""Load images from a name, a folder, an array or a Hub id, and split them into train and test.

The two sides never share an image. A data set has a checksum of its images.

In reading order:

    opening    open image files: errors, warnings and plugins
    decoding   convert, read and resize images
    streamed   images that are decoded whenever they are read
    storage    arrays that may be larger than memory
    dataset    the data set and the split rule
    arrays     arrays, .npy and .npz files
    labels     the classes of images
    encoded    image files, decoded in threads
    cached     decoded images, kept in a file
    listing    files of a folder, and the sides of its split
    tars       images in tar files
    folders    folders of image files or of tar files
    layouts    torchvision's folders of MNIST, CIFAR-10 and CelebA
    hub        the Hugging Face Hub
    names      data sets by name
    loading    `load` and `read_images`, for every source
"""

from poise.data.dataset import Dataset, hold_out
from poise.data.loading import Given, checked_images, find_images, load, read_images
from poise.data.storage import Rows, gather, head, spread

__all__ = [
    "Dataset",
    "Given",
    "Rows",
    "checked_images",
    "find_images",
    "gather",
    "head",
    "hold_out",
    "load",
    "read_images",
    "spread",
]
