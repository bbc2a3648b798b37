"""The classes of a run that was trained with labels."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from poise.errors import InputError, RunError
from poise.runs.checkpoint import read_folder
from poise.shapes import ClassOfEach

MOST_NAMED = 10  # classes in a message


def class_number(label: str | int, classes: Sequence[str], folder: Path) -> int:
    """Return the position of a class among the classes of a run.

    Args:
        label: name of the class. A number is taken for its name.
        classes: names of the classes. Empty: the run was trained without labels.
        folder: of the run, for messages.

    Raises:
        InputError: no class has this name, or the run was trained without labels.
    """
    if not classes:
        raise InputError(
            f"{folder} was trained without labels: train with --labels (labels=True), or leave the "
            "label out"
        )
    if str(label) not in classes:
        close = get_close_matches(str(label), classes, 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        more = ", ..." if len(classes) > MOST_NAMED else ""
        some = ", ".join(classes[:MOST_NAMED])
        raise InputError(f"there is no class {str(label)!r}: there are {some}{more}{guess}")
    return classes.index(str(label))


def read_labels(codes: Path, count: int) -> ClassOfEach:
    """Return the class of each training image, (count,), from the folder of the codes.

    Raises:
        RunError: the folder is missing or damaged, or lacks the labels.
    """
    labels = read_folder(codes).tensors.get("labels")
    if labels is None or labels.shape != (count,):
        raise RunError(f"{codes} lacks the labels of the {count} training images")
    return labels
