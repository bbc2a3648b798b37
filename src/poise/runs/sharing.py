"""Share a run: a folder without the state of the optimizer, with a model card, for the Hub.

A shared folder is a run's folder, so that all commands and `poise.load` take it:

README.md        the model card: data, protocol, numbers with spread, pictures, licence
config.json      settings, data and versions
checkpoints/     one checkpoint with the weights and balances only
codes/           the posteriors of the training images
mixture/         the mixture prior
latents.json, metrics.jsonl, summary.json, evaluation.json, diagnosis.json, pictures

Weights are safetensors, all else is JSON and text. A repository is data: no code of it is ever run.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import InputError, MissingExtraError, MissingInputError, RunError
from poise.metrics.listed import figures_table
from poise.metrics.pages import check_pages
from poise.runs.checkpoint import (
    newest_intact_checkpoint,
    read_folder,
    save_checkpoint,
)
from poise.runs.folder import read_config
from poise.support.files import read_json, read_regular, write_failure, write_file
from poise.support.html import templates
from poise.support.version import __version__
from poise.variants import find_prior

if TYPE_CHECKING:
    from poise.runs.run import Run

HUB_PREFIX = "hf:"
CARD = "README.md"
LIBRARY = "poise"
COPIED = (
    *("config.json", "latents.json", "metrics.jsonl"),
    *("summary.json", "evaluation.json", "diagnosis.json"),
    *("samples.png", "reconstructions.png", "training.png", "progress.png"),
)
OF_REAL_IMAGES = ("reconstructions.png", "progress.png")
FOLDERS = ("checkpoints", "codes", "mixture")
LICENSE = re.compile(r"[\w.+-]+", re.ASCII)
PATTERNS = ["*.json", "*.safetensors", "*.jsonl", "*.png", CARD]  # what is downloaded
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def save_pretrained(
    run: "Run",
    folder: str | Path,
    *,
    license: str | None,
    codes: bool,
    place: str = "OWNER/NAME",
) -> Path:
    """Write a run to a folder for others: see the module's docstring, and `Run.save_pretrained`."""
    if license is not None and not LICENSE.fullmatch(license):
        raise InputError(f"license must be a name of the Hub, such as mit, not {license!r}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another name")
    if not run.finished:
        raise InputError(
            f"{run.folder} is not finished, and only finished runs are shared: "
            "continue with `poise train`"
        )
    saved, _ = newest_intact_checkpoint(run.folder / "checkpoints")
    if saved is None:
        raise RunError(f"{run.folder} has no checkpoint any more: put it back from a copy")
    kept = FOLDERS[1:] if codes else FOLDERS[2:]
    folders = [name for name in kept if (run.folder / name).is_dir()]
    for name in folders:
        read_folder(run.folder / name)  # only what is intact is shared
    tensors = {}
    for stage in ("stage1.", "stage2."):
        averaged = any(name.startswith(f"{stage}average.") for name in saved.tensors)
        parts = (f"{stage}{'average' if averaged else 'vae'}.", f"{stage}balance.")
        tensors |= {name: t for name, t in saved.tensors.items() if name.startswith(parts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            if (run.folder / name).is_file() and (codes or name not in OF_REAL_IMAGES):
                shutil.copyfile(run.folder / name, folder / name)
        position = saved.meta.get("position") or int(run.position)
        save_checkpoint(folder / "checkpoints", position, tensors, saved.meta)
        for name in folders:
            shutil.copytree(run.folder / name, folder / name)
        # The name of a folder may hold bytes that are not UTF-8.
        text = card(run, folder, license, place).encode(errors="backslashreplace")
        write_file(folder / CARD, text)
    except OSError as error:
        raise write_failure(folder, error) from error
    return folder


def card(run: "Run", folder: Path, license: str | None, place: str) -> str:
    """Return the model card of a run, in Markdown.

    Args:
        run: the run.
        folder: the shared folder, whose pictures are shown.
        place: name of the run on the Hub.
        license: its name on the Hub. None: the card says that it is missing.
    """
    config = read_config(run.folder)
    summary = _read(run.folder / "summary.json")
    evaluation = _read(run.folder / "evaluation.json")
    versions = config.get("versions", {})
    cards = templates("poise.runs", autoescape=False, keep_trailing_newline=True)
    return cards.get_template("card.md").render(
        name=_plain(run.folder.resolve().name),
        place=place,
        recipe=run.recipe,
        data=config["data"],
        source=_plain(_public(config["data"]["source"])),
        custom=run.recipe.network.kind == "custom",
        deterministic=run.deterministic,
        figures=figures_table(summary) if summary else [],
        measurements=evaluation.get("measurements", []),
        protocols=evaluation.get("protocols", {}),
        priors=[(name, find_prior(name)) for name in run.available_priors],
        pictures=[
            (name, words)
            for name, words in (
                ("samples.png", f"Samples of the prior {run.default_prior}"),
                ("reconstructions.png", "Test images, each beside its reconstruction"),
                ("training.png", "Training curves"),
            )
            if (folder / name).is_file()
        ],
        license=license,
        versions=versions,
        version=__version__,
        shown=_shown,
    )


def _plain(text: str) -> str:
    """Return a name with the characters escaped that Markdown and HTML give a meaning."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))


def _public(source: str) -> str:
    """Return the name of the data without the folders of this machine."""
    name = source.removeprefix(HUB_PREFIX)
    if name != source and NAME.fullmatch(name) and not Path(name).exists():
        return source
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]  # the run may come from Windows


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    values = read_json(path, dict[str, Any])
    check_pages(values, str(path))
    return values


def _shown(measurement: dict[str, Any]) -> str:
    """Return a value with its spread and unit."""
    value, spread = measurement.get("value"), measurement.get("spread")
    text = "not finite" if value is None else f"{value:.5g}"
    text += "" if spread is None else f" ± {spread:.2g}"
    return f"{text} {measurement.get('unit', '')}".strip()


def push_to_hub(
    run: "Run",
    name: str,
    *,
    private: bool,
    license: str | None,
    codes: bool,
    token: str | None,
) -> str:
    """Upload a run to the Hugging Face Hub and return its address: see `Run.push_to_hub`."""
    if not NAME.fullmatch(name) or "@" in name:
        raise InputError(f"the name on the Hub must be OWNER/NAME, not {name!r}")
    hub = _library()
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(
            run, Path(scratch) / "run", license=license, codes=codes, place=name
        )
        try:
            api = hub.HfApi(token=token)
            place = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="Share a run",
                delete_patterns=[*(f"{kept}/*" for kept in FOLDERS), *COPIED],  # of earlier runs
            )
        except Exception as error:  # the library and the network raise dozens of types
            raise RunError(f"{name} cannot be uploaded ({_reason(error)})") from error
    return str(place)


def fetched(name: str) -> Path:
    """Return the folder of a shared run.

    Args:
        name: "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION" on the Hub, or "hf:" and the path of a
            local folder.

    Raises:
        InputError: the name is no such name, or the model card is damaged or of another library.
        MissingExtraError: huggingface_hub is not installed.
        MissingInputError: the run cannot be downloaded.
    """
    place = name.removeprefix(HUB_PREFIX)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if not NAME.fullmatch(place):
            raise InputError(f"{name} is neither hf:OWNER/NAME nor hf: and a local folder")
        hub, (repository, _, revision) = _library(), place.partition("@")
        try:
            folder = Path(
                hub.snapshot_download(
                    repository, revision=revision or None, allow_patterns=PATTERNS
                )
            )
        except Exception as error:  # the library and the network raise dozens of types
            raise MissingInputError(
                f"{name} cannot be downloaded ({_reason(error)}): check the name and the network"
            ) from error
    check_card(folder)
    return folder


def check_card(folder: Path) -> None:
    """Check that the model card of a folder, if there is one, is that of a run.

    Raises:
        InputError: it is damaged, or names another library.
    """
    path = folder / CARD
    if not path.exists():
        return
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({_reason(error)}): download it again") from None
    values = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    library = values and re.search(r"^library_name:\s*[\"']?([\w.-]+)", values[1], re.MULTILINE)
    if not library:
        raise InputError(f"{path} is damaged: it names no library_name; download it again")
    if library[1] != LIBRARY:
        raise InputError(f"{path} is of a model of {library[1]}: give a run of Poise")


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("the Hugging Face Hub", "hub") from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
