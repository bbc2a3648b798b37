"""Test sharing: a folder that loads as the run it is of, a model card, and the Hub as a folder."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import poise
from poise.errors import InputError, MissingExtraError, MissingInputError, RunError
from poise.report import models
from poise.runs import sharing
from poise.variants import available_priors


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the Hub by a folder, and return it."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            (root / name).mkdir(parents=True, exist_ok=exist_ok)
            (root / "private").write_text(str(private))
            return f"https://hub/{name}"

        def upload_folder(
            self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list
        ) -> None:
            for old in [path for path in (root / repo_id).rglob("*") if path.is_file()]:
                name = old.relative_to(root / repo_id).as_posix()
                if any(fnmatch(name, pattern) for pattern in delete_patterns):
                    old.unlink()
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (root / name).is_dir() or revision not in (None, "main"):
            raise OSError(f"404: no\n{name}")
        (root / "revision").write_text(str(revision))
        return str(root / name)

    monkeypatch.setattr(
        sharing, "_library", lambda: SimpleNamespace(HfApi=Api, snapshot_download=download)
    )
    return root


def test_pushing_again_leaves_nothing_of_the_earlier_run(small_run, hub):
    """Former defects: earlier checkpoints were loaded, and codes stayed despite codes=False."""
    place = hub / "owner" / "tiny"
    (place / "checkpoints" / "0000999999").mkdir(parents=True)
    (place / "checkpoints" / "0000999999" / "tensors.safetensors").write_text("old")
    (place / "own.md").write_text("mine")
    small_run.push_to_hub("owner/tiny")
    assert (place / "codes").exists()
    small_run.push_to_hub("owner/tiny", codes=False)
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert not any(name.startswith(("codes/", "checkpoints/0000999999")) for name in files)
    assert "own.md" in files and "reconstructions.png" not in files


def test_names_in_a_card_are_no_markdown_and_a_licence_is_a_name(small_run, tmp_path):
    shutil.copytree(small_run.folder, tmp_path / "faces<b>*x*")
    run = poise.load(tmp_path / "faces<b>*x*", device="cpu")
    card = (run.save_pretrained(tmp_path / "shared") / "README.md").read_text()
    assert r"# faces\<b\>\*x\*" in card
    with pytest.raises(InputError, match="license must be a name of the Hub"):
        run.save_pretrained(tmp_path / "other", license="other: research only")


def test_a_run_that_was_pushed_loads_as_the_same_run(small_run, hub):
    assert small_run.push_to_hub("owner/tiny", license="mit", token="t") == "https://hub/owner/tiny"
    assert (hub / "private").read_text() == "True"
    loaded = poise.load("hf:owner/tiny", device="cpu")
    assert not any(module.training for module in loaded.first.vae.modules())
    for prior in available_priors("vae"):
        assert torch.equal(loaded.sample(3, prior=prior), small_run.sample(3, prior=prior))
    assert torch.equal(loaded.codes.mean, small_run.codes.mean)
    assert (loaded.folder / "metrics.jsonl").exists()
    assert (hub / "revision").read_text() == "None"
    poise.load("hf:owner/tiny@main", device="cpu")
    assert (hub / "revision").read_text() == "main"
    with pytest.raises(MissingInputError, match="cannot be downloaded"):
        poise.load("hf:owner/tiny@branch")
    small_run.push_to_hub("owner/public", private=False)
    assert (hub / "private").read_text() == "False"
    card = (hub / "owner" / "tiny" / "README.md").read_text()
    assert "license: mit\n" in card and 'poise.load("hf:owner/tiny")' in card


def test_a_shared_folder_holds_weights_and_no_optimizer(small_run, tmp_path):
    folder = small_run.save_pretrained(tmp_path / "shared")
    (tensors,) = (folder / "checkpoints").rglob("*.safetensors")
    with safe_open(tensors, "pt") as file:
        assert {name.split(".")[1] for name in file.keys()} == {"vae", "balance"}  # noqa: SIM118
    endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert endings == {".json", ".jsonl", ".safetensors", ".png", ".md"}


def test_the_model_card_has_the_data_the_numbers_and_a_place_for_the_licence(small_run, tmp_path):
    card = (small_run.save_pretrained(tmp_path / "shared") / "README.md").read_text()
    evaluation = json.loads((small_run.folder / "evaluation.json").read_text())
    for m in evaluation["measurements"]:
        assert f"| {m['metric']} | {m['of']} | {m['value']:.5g}" in card
        assert m["protocol"] in card and (m["spread"] is None or f"± {m['spread']:.2g}" in card)
    assert small_run.data["checksum"] in card and "![" in card and "license:" not in card
    assert "To be filled in" in card and card.startswith("---\nlibrary_name: poise\n")


def test_a_run_without_codes_samples_but_is_not_renormalised(small_run, tmp_path):
    small_run.save_pretrained(tmp_path / "shared", codes=False)
    assert (small_run.folder / "reconstructions.png").is_file()
    shared = {path.name for path in (tmp_path / "shared").iterdir()}
    assert "samples.png" in shared and not shared & {"reconstructions.png", "progress.png"}
    assert "reconstructions.png" not in (tmp_path / "shared" / "README.md").read_text()
    loaded = poise.load(tmp_path / "shared", device="cpu")
    for prior in available_priors("vae"):
        assert torch.equal(loaded.sample(3, prior=prior), small_run.sample(3, prior=prior))
    with pytest.raises(RunError, match="shared without"):
        _ = loaded.codes
    evaluation = loaded.evaluate(np.zeros((9, 1, 8, 8), np.uint8), extractor="pixels")
    measured = {m.of for m in evaluation.measurements}
    assert {"REC", "GEN-1", "GEN-2", "GEN-mixture"} <= measured


def test_a_model_without_kl_is_called_deterministic(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    options = poise.Options(device="cpu", quiet=True, threads=1)
    settings = {"epochs": 1, "stages": 1, "objective": "autoencoder", "network": "mlp"}
    run = poise.train(images, out=tmp_path / "run", options=options, **settings)
    card = (run.save_pretrained(tmp_path / "shared") / "README.md").read_text()
    assert "A deterministic autoencoder of grey images" in card and "KL" not in card.split("##")[0]
    assert "- autoencoder\n" in card and "- vae\n" not in card
    assert (tmp_path / "shared" / "latents.json").is_file()
    assert models._of_codes(run)["kl_nats_per_latent"] is None


def test_the_source_of_a_card_has_no_folders(tmp_path):
    for source, shown in (
        ("hf:owner/name@main", "hf:owner/name@main"),
        (f"hf:{tmp_path}/faces", "faces"),
        (f"{tmp_path}/faces/", "faces"),
        (r"C:\Users\someone\faces", "faces"),
        ("digits", "digits"),
    ):
        assert sharing._public(source) == shown


def test_a_run_with_classes_samples_its_mixture_without_codes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    settings = {"recipe": "digits", "latent_dim": 3, "epochs": 1, "second_epochs": 1}
    quiet = poise.Options(device="cpu", quiet=True)
    run = poise.train(
        images, labels=["a", "b"] * 30, out=tmp_path / "run", options=quiet, **settings
    )
    loaded = poise.load(run.save_pretrained(tmp_path / "shared", codes=False), device="cpu")
    drawn = [each.sample(3, prior="mixture", label="b") for each in (run, loaded)]
    assert torch.equal(*drawn)


def test_damaged_codes_are_not_shared_and_leave_no_folder_behind(small_run, tmp_path):
    copied = shutil.copytree(small_run.folder, tmp_path / "copied")
    (tensors,) = (copied / "codes").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-9])
    run = poise.load(copied, device="cpu")
    with pytest.raises(RunError, match="is damaged"):
        run.save_pretrained(tmp_path / "shared")
    assert run.save_pretrained(tmp_path / "shared", codes=False).is_dir()


def test_a_network_of_your_own_is_given_to_load(tmp_path):
    def own() -> poise.VAE:
        return poise.VAE(*poise.networks.mlp((1, 8, 8), 3, hidden=(5,)))

    options = poise.Options(device="cpu", quiet=True, threads=1)
    settings = {"epochs": 1, "stages": 1, "batch_size": 20}
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    run = poise.train(images, out=tmp_path / "run", vae=own(), options=options, **settings)
    folder = run.save_pretrained(tmp_path / "shared")
    assert "vae=vae" in (folder / "README.md").read_text()
    with pytest.raises(InputError, match=r"a network of your own: .*poise.load\(..., vae=...\)"):
        poise.load(f"hf:{folder}")
    loaded = poise.load(f"hf:{folder}", vae=own(), device="cpu")
    assert torch.equal(loaded.sample(2), run.sample(2))


def damaged(text: bytes):
    def damage(run: poise.Run, folder: Path) -> None:
        run.save_pretrained(folder)
        (folder / "README.md").write_bytes(text)

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run, folder: folder.mkdir(), "is not a run's folder: it has no config.json"),
        (damaged(b"\xff\xfe"), "README.md is damaged .*download it again"),
        (damaged(b"# no values"), "README.md is damaged: it names no library_name"),
        (damaged(b"---\nlibrary_name: diffusers\n---\n"), "README.md is of a model of diffusers"),
    ],
    ids=["no run", "bytes", "no values", "another library"],
)
def test_what_is_no_shared_run_is_one_line(damage, message, small_run, tmp_path):
    damage(small_run, tmp_path / "shared")
    with pytest.raises(InputError, match=message) as raised:
        poise.load(f"hf:{tmp_path / 'shared'}")
    assert len(str(raised.value).splitlines()) == 1


def test_what_the_hub_refuses_is_one_line(small_run, hub, monkeypatch, tmp_path):
    with pytest.raises(MissingInputError, match=r"cannot be downloaded \(404: no owner/gone\)"):
        poise.load("hf:owner/gone")
    with pytest.raises(InputError, match="neither hf:OWNER/NAME nor"):
        poise.load("hf:nonsense here")
    with pytest.raises(InputError, match="must be OWNER/NAME, not 'tiny'"):
        small_run.push_to_hub("tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        small_run.save_pretrained(tmp_path / "full")
    hub.mkdir()
    (hub / "owner").touch()  # creating the repository fails
    with pytest.raises(RunError, match="owner/tiny cannot be uploaded"):
        small_run.push_to_hub("owner/tiny")
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"poise\[hub\]"):
        poise.load("hf:owner/tiny")
