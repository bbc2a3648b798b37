"""Reference statistics: mean and covariance of the features of real images, in a file.

The Frechet distance needs no more of the real images. KID, precision, recall, density and coverage
need the features themselves. Three kinds of files are read:

    Poise           .npz with mu, sigma and the conditions of their protocol (`write_statistics`)
    torch-fidelity  .pt of its cache, NAME-inception-v3-compat-stat-fid-2048.pt
    others          .npz with mu and sigma, as clean-fid, TTUR and pytorch-fid write it

A Frechet distance is meaningful only if network and resize of both sides are the same. The files of
others do not say what they are. Names of torch-fidelity's and clean-fid's files do; of other files
the user has to say who computed them. `poise.protocols.ORIGINS` lists those that use the 2015
Inception with the resize of TensorFlow 1, as Poise does, and `OTHERS` those that do not.

Read in their sources: torch-fidelity 0.4.0, clean-fid 0.1.35, pytorch-fid 0.3.0.
"""

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, MissingInputError
from poise.metrics.distances import Gaussian, covariance_factor
from poise.protocols import ORIGINS, OTHERS, Protocol
from poise.support.files import decode_json, read_regular, write_file

FEATURES = 2048  # of the 2015 Inception
ROUNDING = 1e-3  # relative; others store float32
# Conditions of the real images. A file must agree on them with the images that are compared.
CONDITIONS = ("extractor", "extractor_checksum", "resize", "pixels", "jpeg")

_FIDELITY = re.compile(r"(?P<data_and_network>.+)-stat-fid-(?P<feature>\w+)\.pt")
_CLEAN = re.compile(
    r".+_(?P<mode>clean|legacy_tensorflow|legacy_pytorch)(?P<model>_clip\w*)?_[^_]+_[^_]+\.npz",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Conditions:
    """Conditions of the statistics in a file of Poise; see `Protocol` for the first attributes."""

    reference: str
    images: int
    side: int
    pixels: str
    jpeg: int | None
    extractor: str
    extractor_checksum: str
    resize: str
    data: str
    poise: str = ""


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of the features of real images.

    Attributes:
        mean: (d,), float64.
        covariance: (d, d), float64, n - 1 in the denominator.
        images: number of images behind them, >= 2.
        origin: who computed them: "poise" or a key of `ORIGINS`.
        data: first twelve digits of the SHA-256 of the images (of a file of others: of mean and
            covariance, after "mu,sigma ").
        conditions: what a file of Poise says about its images. None: a file of others.
    """

    mean: Tensor
    covariance: Tensor
    images: int
    origin: str
    data: str
    conditions: Conditions | None = None

    @property
    def extractor(self) -> str:
        """Name of the network that computed the features."""
        return self.conditions.extractor if self.conditions else "inception"

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian of these statistics, for `distance_between`.

        Raises:
            InputError: the covariance is not one: it has negative eigenvalues.
        """
        factor = covariance_factor(self.covariance)
        trace, total = float(self.covariance.trace()), float(factor.square().sum())
        if abs(total - trace) > ROUNDING * trace:
            raise InputError(
                "sigma of the reference statistics is not a covariance: it has negative "
                "eigenvalues; compute the statistics again"
            )
        return Gaussian(self.mean, factor)

    def protocol(self, protocol: Protocol, side: int) -> Protocol:
        """Return the protocol of a comparison with these statistics.

        Args:
            protocol: of the produced images, with its extractor and checksum.
            side: of the produced images, in pixels.

        Raises:
            InputError: the statistics are of other conditions.
        """
        if protocol.real not in (None, self.images):
            raise InputError(
                f"protocol {protocol.name} is of {protocol.real} real images, and the statistics "
                f"are of {self.images}: choose another --protocol"
            )
        known = self.conditions
        if known is None:
            wanted = {"extractor": "inception", "pixels": "8-bit", "jpeg": None}
            _check_conditions(wanted, protocol, self.origin)
            return replace(
                protocol, reference="given", real=self.images, side=side, statistics=self.origin
            )
        _check_conditions({name: getattr(known, name) for name in CONDITIONS}, protocol, "the file")
        if known.side != side:
            raise InputError(
                f"the statistics are of images of {known.side} pixels, and these have {side}: "
                f"pass --size {known.side}"
            )
        reference: Any = known.reference
        return replace(protocol, reference=reference, real=self.images, side=side)


def _check_conditions(wanted: dict[str, Any], protocol: Protocol, who: str) -> None:
    for name, value in wanted.items():
        found = getattr(protocol, name)
        if found != value:
            raise InputError(
                f"the statistics of {who} have {name} {value or 'none'}, and this comparison has "
                f"{found or 'none'}: they cannot be compared"
            )


def is_statistics(source: Any) -> bool:
    """Return whether a source of images is reference statistics, by its ending and its arrays."""
    if isinstance(source, ReferenceStatistics):
        return True
    if not isinstance(source, (str, Path)) or not Path(source).is_file():
        return False
    if Path(source).suffix.lower() == ".pt":
        return True
    if Path(source).suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(source) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):  # the reader of images names what is wrong
        return False


def read_statistics(
    source: str | Path, *, by: str | None = None, images: int | None = None
) -> ReferenceStatistics:
    """Return the reference statistics in a file.

    Args:
        source: a file of one of the kinds above.
        by: who computed them, a key of `ORIGINS`. None: the file or its name says it.
        images: number of images behind them, >= 2. None: the file says it, as those of Poise do.

    Raises:
        MissingInputError: there is no such file.
        InputError: the file is damaged; or its network, resize or number of images differ from what
            a comparison needs, or cannot be told.

    Example:
        >>> statistics = read_statistics("cifar10.npz", by="ttur", images=50_000)  # doctest: +SKIP
        >>> poise.evaluate(statistics, "samples/").value("FID")                    # doctest: +SKIP
        12.3
    """
    path = Path(source)
    arrays = _read_torch(path) if path.suffix.lower() == ".pt" else _read_npz(path)
    mean, covariance = _checked(arrays, path)
    if "poise" in arrays:
        if by is not None or images is not None:
            raise InputError(
                f"{path} says itself who computed it and from how many images: "
                "leave --statistics-by and --statistics-images out"
            )
        text = str(arrays["poise"]).encode()
        known = decode_json(text, Conditions, f"{path}: poise")
        return ReferenceStatistics(mean, covariance, known.images, "poise", known.data, known)
    named = _origin_in_name(path)
    if by is not None and named is not None and by != named:
        raise InputError(f"{path}: its name says {named}, and --statistics-by says {by}")
    origin = by or named
    _check_origin(path, origin)
    assert origin is not None
    if images is None or images < 2:
        given = "does not say" if images is None else f"cannot be of {images} images, nor say"
        raise InputError(
            f"{path} {given} how many images it is of, which the Frechet distance depends on: "
            "pass --statistics-images N"
        )
    if len(mean) != FEATURES or float(mean.min()) < 0:
        raise InputError(
            f"{path} is not of the last pooling layer of the 2015 Inception: mu has {len(mean)} "
            f"values from {float(mean.min()):.3g}, not {FEATURES} values of at least 0"
        )
    digest = hashlib.sha256(mean.numpy().tobytes() + covariance.numpy().tobytes()).hexdigest()
    return ReferenceStatistics(mean, covariance, images, origin, f"mu,sigma {digest[:12]}")


def _origin_in_name(path: Path) -> str | None:
    """Return who computed a file by its name, or None if the name does not say it."""
    if found := _FIDELITY.fullmatch(path.name):
        if path.name.endswith(f"-inception-v3-compat-stat-fid-{FEATURES}.pt"):
            return "torch-fidelity"
        return f"torch-fidelity, {found['data_and_network']}, feature {found['feature']}"
    if found := _CLEAN.fullmatch(path.name):
        mode = found["mode"].lower().replace("_", "-")
        return f"clean-fid-{mode}" + (found["model"] or "").replace("_", "-")
    return None


def _check_origin(path: Path, origin: str | None) -> None:
    if origin in ORIGINS:
        return
    allowed = ", ".join(ORIGINS)
    if origin is None:
        raise InputError(
            f"{path} does not say which network and resize computed it: pass --statistics-by "
            f"with {allowed}; others cannot be compared"
        )
    reason = OTHERS.get(origin, "another network, or another resize")
    raise InputError(
        f"{path} is of {origin} ({reason}): only the 2015 Inception with the resize of "
        f"TensorFlow 1 can be compared, as of {allowed}"
    )


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(BytesIO(read_regular(path)), allow_pickle=False) as archive:
            return {name: archive[name] for name in ("mu", "sigma", "poise") if name in archive}
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file of statistics") from None
    except Exception as error:  # numpy and zipfile can raise anything on a damaged file
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as an .npz file ({reason})") from None


def _read_torch(path: Path) -> dict[str, Any]:
    """Return mu and sigma of a file of torch-fidelity's cache, without running code in it."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
    arrays: list[Any] = [np.ndarray, np.dtype]
    # numpy 1 and 2 name it differently, and a file may be of either.
    arrays += [
        (multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct")
        for core in ("core", "_core")
    ]
    arrays += [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    try:
        with torch.serialization.safe_globals(arrays):
            found = torch.load(BytesIO(read_regular(path)), "cpu", weights_only=True)
        return {name: np.asarray(found[name]) for name in ("mu", "sigma")}
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file of statistics") from None
    except Exception as error:  # torch and pickle can raise anything on a damaged file
        raise InputError(
            f"{path} is not a file of statistics of torch-fidelity "
            f"({type(error).__name__}): give one that holds mu and sigma"
        ) from None


def _checked(arrays: dict[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    mean, covariance = (np.asarray(arrays.get(name, [])) for name in ("mu", "sigma"))
    size = len(mean) if mean.ndim == 1 else 0
    kinds = {array.dtype.kind for array in (mean, covariance)}
    if kinds != {"f"} or size < 1 or covariance.shape != (size, size):
        raise InputError(
            f"{path} must hold the mean mu (d,) and the covariance sigma (d, d) of features, as "
            f"floats, not {mean.dtype} {mean.shape} and {covariance.dtype} {covariance.shape}"
        )
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance))
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise InputError(f"{path}: mu and sigma must be finite: compute the statistics again")
    largest = float(covariance.diagonal().abs().max())
    if float((covariance - covariance.T).abs().max()) > ROUNDING * largest:
        raise InputError(f"{path}: sigma is not symmetric: compute the statistics again")
    return mean, covariance


def write_statistics(path: str | Path, statistics: ReferenceStatistics) -> None:
    """Write reference statistics as .npz: mu and sigma, float64, and the conditions as JSON.

    Other libraries read mu and sigma, and ignore the rest.

    Raises:
        InputError: the file's name does not end in .npz, or the statistics are not of Poise.
        RunError: the file cannot be written.
    """
    if Path(path).suffix.lower() != ".npz" or statistics.conditions is None:
        raise InputError(f"{path}: reference statistics of Poise are written to an .npz file")
    text, buffer = json.dumps(vars(statistics.conditions)), BytesIO()
    np.savez(
        buffer,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        poise=np.array(text),
    )
    write_file(Path(path), buffer.getvalue())
