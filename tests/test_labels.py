"""Test labels: where they are read, and that a flow and a mixture draw images of one class."""

import gzip
import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import nn

import poise
from poise import cli
from poise.data import find_images, load
from poise.errors import InputError
from poise.explore.graphs import graph_of
from poise.flow import DROPPED, Flow
from poise.latent import DiagonalGaussian
from poise.objectives import make_objective
from poise.priors import FlowPrior, MixturePrior, RenormalisedPrior, fit_mixture
from poise.recipes import Data, Generation, Network, Recipe, Stage
from poise.report import models
from poise.runs import checkpoint, pipeline
from poise.runs.options import Options
from poise.support.seeds import generator
from poise.training import CodeBatches

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (24, 8, 8), dtype=np.uint8)
CLASSES = np.array(["cat", "dog", "eel"])[RANDOM.permutation(np.arange(24) % 3)]
CPU = torch.device("cpu")


def folder_of_classes(root: Path, form: str) -> Path:
    """Write PIXELS as files in folders of their classes, every fourth image on the test side."""
    for number, (pixels, name) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        side = "test" if number % 4 == 0 else "train"
        place = root / form.format(name=name, side=side) / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    return root


def by_pixels(dataset: poise.data.Dataset) -> dict[bytes, str]:
    """Return the class of each image by its pixels."""
    labels = dataset.labels
    assert labels is not None
    pairs = [(dataset.train, labels.train), (dataset.test, labels.test)]
    return {
        np.asarray(image).tobytes(): labels.classes[label]
        for images, numbers in pairs
        for image, label in zip(images, numbers, strict=True)
    }


EXPECTED = {pixels.tobytes(): name for pixels, name in zip(PIXELS, CLASSES, strict=True)}


@pytest.mark.parametrize("form", ["{name}", "{side}/{name}", "{name}/{side}", "a/b/{name}/more"])
def test_the_class_is_the_folder_of_the_image(form, tmp_path):
    found = load(folder_of_classes(tmp_path, form), labels=True)
    assert found.labels.classes == ("cat", "dog", "eel") and by_pixels(found) == EXPECTED
    plain = load(tmp_path)
    assert plain.labels is None and plain.checksum == found.checksum
    given = find_images(tmp_path, side="all", labels=True)
    assert dict(zip(map(bytes, given.images), given.labels, strict=True)) == EXPECTED


@pytest.mark.parametrize("form", ["{name}", "{name}/batch"])
def test_without_a_split_a_folder_called_like_a_side_is_a_class(form, tmp_path):
    called = {"cat": "valid", "dog": "invalid", "eel": "train"}
    for number, (pixels, name) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        place = tmp_path / form.format(name=called[name]) / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    shutil.rmtree(tmp_path / "train")
    found = load(tmp_path, labels=True)
    assert found.labels is not None and found.labels.classes == ("invalid", "valid")


def test_labels_may_be_bytes_of_utf8(unchecked):
    names = np.array([name.encode() for name in np.where(CLASSES == "cat", "café", CLASSES)])
    found = load(PIXELS, labels=names).labels
    assert found is not None and found.classes == ("café", "dog", "eel")
    with pytest.raises(InputError, match="labels are bytes that are not UTF-8"):
        load(PIXELS, labels=np.where(CLASSES == "cat", b"\xe9", b"dog"))


def test_labels_stand_beside_the_arrays_of_images(tmp_path):
    numbers = (CLASSES == "dog") + 10 * (CLASSES == "eel")
    np.savez(tmp_path / "whole.npz", images=PIXELS, labels=CLASSES)
    sides = {"x_train": PIXELS[:16], "Y_Train": numbers[:16, None]}
    sides |= {"x_test": PIXELS[16:], "y_test": numbers[16:, None]}
    np.savez(tmp_path / "split.npz", **sides)
    assert by_pixels(load(tmp_path / "whole.npz", labels=True)) == EXPECTED
    split = load(tmp_path / "split.npz", labels=True)
    assert split.labels.classes == ("0", "1", "10"), "numbers are in their own order"
    np.testing.assert_array_equal(
        split.labels.test, np.unique(numbers, return_inverse=True)[1][16:]
    )
    given = load(PIXELS, labels=torch.from_numpy(numbers))
    assert {EXPECTED[key] for key, name in by_pixels(given).items() if name == "10"} == {"eel"}
    for listed in (list(CLASSES), pd.Series(CLASSES), np.array(list(CLASSES), object)):
        assert by_pixels(load(PIXELS, labels=listed)) == EXPECTED
    renamed = {key.lower().replace("test", "val"): array for key, array in sides.items()}
    np.savez(tmp_path / "val.npz", **renamed)
    validated = load(tmp_path / "val.npz", labels=True)
    np.testing.assert_array_equal(validated.labels.test, split.labels.test)
    whole = find_images(tmp_path / "split.npz", side="all", labels=True)
    assert whole.labels == tuple(map(str, numbers))


def test_labels_of_torchvisions_files_and_of_the_digits(tmp_path):
    numbers = np.arange(24, dtype=np.uint8) % 3
    for part, rows in (("train", slice(0, 16)), ("t10k", slice(16, 24))):
        images = struct.pack(">4I", 0x803, len(PIXELS[rows]), 8, 8) + PIXELS[rows].tobytes()
        labels = struct.pack(">2I", 0x801, len(PIXELS[rows])) + numbers[rows].tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    found = load(tmp_path, labels=True)
    np.testing.assert_array_equal(found.labels.train, numbers[:16])
    cifar = tmp_path / "cifar"
    cifar.mkdir()
    colour = RANDOM.integers(0, 256, (24, 3072), dtype=np.uint8)
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = slice(4 * number, 4 * number + 4)
        batch = {b"data": colour[rows], b"labels": [int(n) for n in numbers[rows]]}
        (cifar / name).write_bytes(pickle.dumps(batch))
    (cifar / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"x", b"a", b"m"]}))
    found = load(cifar, labels=True)
    assert found.labels.classes == ("a", "m", "x")
    np.testing.assert_array_equal(found.labels.train, np.array([2, 0, 1])[numbers[:20]])
    digits, target = load("digits", labels=True), load_digits().target
    assert digits.labels.classes == tuple("0123456789")
    counts = np.bincount([*digits.labels.train, *digits.labels.test])
    np.testing.assert_array_equal(counts, np.bincount(target))


def test_labels_that_are_not_there_are_refused_in_one_line(tmp_path, unchecked):
    folder_of_classes(tmp_path / "photos", "{name}")
    Image.fromarray(PIXELS[0]).save(tmp_path / "photos" / "loose.png")
    np.savez(tmp_path / "x.npz", images=PIXELS)
    np.savez(tmp_path / "objects.npz", images=PIXELS, labels=CLASSES.astype(object))
    np.savez(tmp_path / "short.npz", images=PIXELS, labels=CLASSES[:5])
    sides = {"x_train": PIXELS[:16], "x_test": PIXELS[16:], "y_train": np.arange(16) % 2}
    np.savez(tmp_path / "new.npz", **sides, y_test=np.arange(8))
    for source, labels, message in (
        (tmp_path / "photos", True, "photos has no labels: put each class into a folder"),
        (tmp_path / "x.npz", True, "has no labels: .* or y_train beside x_train"),
        (tmp_path / "short.npz", True, "one label for each of the 24 images, .* of shape \\(5,\\)"),
        (tmp_path / "objects.npz", True, r"\(labels\) holds Python .* labels\.astype\(str\)"),
        (tmp_path / "new.npz", True, "class 2 has test images only"),
        (PIXELS, True, "array has no labels"),
        (PIXELS, np.zeros(24), "whole numbers or text, not float64"),
        (PIXELS, np.zeros(24, int), "has one class, 0: labels need at least 2"),
        (tmp_path / "x.npz", CLASSES, "an array of labels is for an array of images"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load(source, labels=labels)
        assert "\n" not in str(error.value)


MEANS = torch.tensor([[2.0, -1.0], [-1.0, 0.5]], dtype=torch.float64)
VARIANCES = torch.tensor([0.2, 0.6, 1.3], dtype=torch.float64)  # of both classes, and of none


class ExactOfClass(nn.Module):
    """The velocity of codes N(m_c, s_c I) of two classes, and of N(0, s I) for no class."""

    def forward(self, y, t, labels):
        mean = torch.cat([MEANS, torch.zeros(1, 2, dtype=torch.float64)])[labels]
        s, t = VARIANCES[labels][:, None], t[:, None]
        return mean + (t * s - (1 - t)) / ((1 - t) ** 2 + t**2 * s) * (y - t * mean)


def exact() -> Flow:
    flow = Flow(ExactOfClass(), (2,), classes=2).double()
    flow.frequencies.copy_(torch.tensor([0.25, 0.75]))
    return flow


def test_a_flow_with_classes_draws_each_class_and_all_by_frequency():
    """The flow of N(m, s I) is y -> m + sqrt(s) y."""
    noise = torch.randn(400, 3, dtype=torch.float64, generator=generator("labels", 0))
    prior = FlowPrior(exact(), steps=12)
    assert prior.noise_dims == 3
    of_class = [MEANS[c] + VARIANCES[c].sqrt() * noise[:, :2] for c in (0, 1)]
    for label in (0, 1):
        found = prior.of_class(label).latents(noise)
        torch.testing.assert_close(found, of_class[label], atol=0.03, rtol=0)
    first = torch.special.ndtr(noise[:, 2]) <= 0.25
    expected = torch.where(first[:, None], of_class[0], of_class[1])
    torch.testing.assert_close(prior.latents(noise), expected, atol=0.03, rtol=0)
    plain = FlowPrior(exact(), steps=12, guidance=0.0).latents(noise)
    torch.testing.assert_close(plain, VARIANCES[2].sqrt() * noise[:, :2], atol=0.03, rtol=0)
    scaled = RenormalisedPrior(prior, 2.0).of_class(1).latents(noise)
    torch.testing.assert_close(scaled, 2 * prior.of_class(1).latents(noise))


def test_guidance_goes_further_in_the_direction_of_the_class():
    flow, y, t = exact(), torch.randn(5, 2, dtype=torch.float64), torch.full((5,), 0.4).double()
    labels = torch.tensor([0, 1, 1, 0, 1])
    plain, given = flow(y, t), flow(y, t, labels)
    for guidance in (0.0, 1.0, 2.5):
        found = FlowPrior(flow, steps=3, guidance=guidance)._velocity(y, t, labels)
        torch.testing.assert_close(found, plain + guidance * (given - plain))


def test_the_class_travels_with_its_code_and_is_dropped_in_a_share_of_items():
    labels = torch.arange(6) % 2
    codes = CodeBatches(torch.zeros(6, 2), torch.zeros(6, 2), CPU, labels=labels)
    batch = codes.place(torch.tensor([3, 0, 5]), lambda columns: torch.ones(3, columns))
    torch.testing.assert_close(batch, torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, 1]]))
    flow, many = exact(), torch.zeros(20_000, 3)
    noise = torch.randn(20_000, flow.noise_dims, generator=generator("labels", 1))
    kept, rest, seen = flow.separate(many, noise)
    assert (
        kept.shape == (20_000, 2)
        and torch.equal(rest, noise[:, :3])
        and set(seen.tolist()) == {0, 2}
    )
    assert float((seen == 2).double().mean()) == pytest.approx(DROPPED, abs=0.01)


class ShiftedOfClass(ExactOfClass):
    """The exact velocity, and 0.5 more for the second class."""

    def forward(self, y, t, labels):
        return super().forward(y, t, labels) + 0.5 * (labels == 1)[:, None]


def test_the_loss_is_least_at_the_exact_velocity_of_each_class():
    flow, count = exact(), 40_000
    labels = torch.arange(count) % 2
    rows = torch.randn(count, 2, generator=generator("codes", 1), dtype=torch.float64)
    codes = MEANS[labels] + VARIANCES[labels].sqrt()[:, None] * rows
    items = torch.cat([codes, labels[:, None].double()], dim=1)
    noise = torch.randn(count, flow.noise_dims, generator=generator("noise", 1)).double()
    balance = poise.FixedBalance(gamma2=0.5)
    least = make_objective("flow")(flow, balance, items, noise)
    flow.velocity = ShiftedOfClass()
    shifted = make_objective("flow")(flow, balance, items, noise)
    share = (1 - DROPPED) / 2  # of items that are shown as the second class
    assert float(least.kl) == 0
    assert float(shifted.mse - least.mse) == pytest.approx(share * 0.5**2, abs=0.02)


def test_a_network_without_classes_has_its_weights_as_before():
    for shape in ((3,), (2, 4, 4)):
        made = []
        for classes in (0, 5):
            with poise.support.seeds.seeded(0):
                made.append(poise.networks.flow(shape, width=8, blocks=3, classes=classes))
        plain, labelled = (network.state_dict() for network in made)
        assert labelled.keys() - plain.keys() == {"label.weight"}
        assert all(torch.equal(plain[name], labelled[name]) for name in plain)


def test_a_mixture_is_fitted_to_each_class():
    labels = torch.arange(90) % 3
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    mean = centres[labels] + 0.1 * torch.randn(90, 2, generator=generator("labels", 2))
    codes = DiagonalGaussian(mean, torch.full_like(mean, -9.0))
    found = fit_mixture(codes, labels=labels, components=2)
    noise = torch.randn(200, found.noise_dims, generator=generator("labels", 3))
    for label in range(3):
        drawn = found.of_class(label).latents(noise)
        assert float((drawn - centres[label]).norm(dim=1).max()) < 2
    assert float(found.weights.sum()) == pytest.approx(1)
    restored = MixturePrior.restored(found.state_dict(), 2)
    assert torch.equal(restored.of_class(1).latents(noise), found.of_class(1).latents(noise))
    assert "labels" not in fit_mixture(codes).state_dict()


IMAGES = np.clip(
    RANDOM.normal(128, 20, (60, 8, 8)) + np.where(np.arange(60) % 2, 80, -80)[:, None, None], 0, 255
).astype(np.uint8)
NAMES = np.where(np.arange(60) % 2, "light", "dark")
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=2, hidden=(16,), flow_width=16, flow_blocks=1),
    first=Stage(steps=40, batch_size=20, learning_rate=1e-2),
    second=Stage(steps=90, batch_size=20, learning_rate=2e-2, objective="flow", ema_decay=0.9),
    generation=Generation(flow_steps=4),
)
QUIET = Options(device="cpu", quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> poise.Run:
    """Return a run with labels and a flow, without its pictures. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "labels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "finish", lambda run, *_, **__: run.save_mixture())
        return poise.train(IMAGES, labels=NAMES, recipe=TINY, out=out, options=QUIET)


def test_a_run_with_labels_draws_images_of_a_class(run, tmp_path):
    assert run.classes == ("dark", "light")
    counts = run.labels.bincount().tolist()
    dataset = run.dataset()
    assert counts == np.bincount(dataset.labels.train).tolist()
    assert run.flow.frequencies.tolist() == pytest.approx([n / sum(counts) for n in counts])
    for prior in (None, "mixture"):
        dark, light = (run.sample(20, label=name, prior=prior) for name in run.classes)
        assert float(light.mean() - dark.mean()) > 0.3
    assert torch.equal(run.sample(3, label="light"), run.sample(120, label="light")[:3])
    guided = run.sample(20, label="light", guidance=2.0)
    assert not torch.equal(guided, run.sample(20, label="light"))
    adjusted = replace(run.recipe.generation, adjust_variance=True)
    for prior in (None, "mixture"):
        adjust = run._adjustment(run.prior(prior, adjusted))  # that of all classes
        found = run.sample(20, label="light", prior=prior, generation=adjusted)
        expected = adjust(run.sample(20, label="light", prior=prior))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    both = run.sample(40).flatten(1).mean(1)
    assert 4 < int((both > 0.5).sum()) < 36, "without a label, all classes are drawn"
    shutil.copytree(run.folder, tmp_path / "copy")
    again = poise.load(tmp_path / "copy", device="cpu")
    assert torch.equal(again.sample(4, label="dark"), run.sample(4, label="dark"))
    assert torch.equal(again.labels, run.labels)
    page = graph_of(run.flow, [torch.zeros(1, 2), torch.zeros(1)], "the flow of all classes")
    assert len(page.inputs) == 2, "a page without labels has the flow of no class"
    saved = checkpoint.read_folder(run.folder / "codes").tensors["labels"]
    assert torch.equal(saved, torch.from_numpy(dataset.labels.train))


def test_without_labels_nothing_changes(tmp_path, monkeypatch):
    """A run on images that have labels is that on images without, to the last bit."""
    monkeypatch.setattr(pipeline, "finish", lambda *_, **__: None)
    np.savez(tmp_path / "both.npz", images=IMAGES, labels=NAMES)
    short = replace(TINY, first=replace(TINY.first, steps=3), second=replace(TINY.second, steps=3))
    weights = []
    for source, out in ((tmp_path / "both.npz", "a"), (IMAGES, "b")):
        plain = poise.train(source, recipe=short, out=tmp_path / out, options=QUIET)
        assert (plain.classes, plain.labels, plain.flow.classes) == ((), None, 0)
        weights.append(plain.flow.state_dict() | plain.first.vae.state_dict())
        assert "labels" not in json.loads((plain.folder / "config.json").read_text())["data"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_report_shows_samples_of_each_class(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_show_data", lambda *arguments: None)  # shown of every run
    page = poise.report.write_report([run.folder], tmp_path / "page.html", device="cpu")
    assert "2 classes, from top to bottom: dark, light" in page.read_text(encoding="utf-8")


def test_wrong_labels_of_a_run_are_refused_in_one_line(run, tmp_path, unchecked, monkeypatch):
    monkeypatch.setattr(pipeline, "finish", lambda *_, **__: None)
    other = replace(TINY, data=replace(TINY.data, labels=True))
    swapped = {"recipe": TINY, "out": run.folder, "options": QUIET}
    one_stage = replace(TINY, second=None, first=replace(TINY.first, steps=2))
    plain = poise.train(IMAGES, recipe=one_stage, out=tmp_path / "plain", options=QUIET)
    requests = {
        "there is no class 'lihgt': there are dark, light; did you mean light?": lambda: run.sample(
            2, label="lihgt"
        ),
        "was trained without labels: train with --labels": lambda: plain.sample(2, label="dark"),
        "this prior takes no label: use the prior mixture": lambda: run.sample(
            2, label="dark", prior="normal"
        ),
        "guidance is of the flow": lambda: run.sample(2, prior="mixture", guidance=2.0),
        "guidance must be a number of at least 0, not -1": lambda: run.sample(2, guidance=-1.0),
        "array has no labels": lambda: poise.train(
            IMAGES, recipe=other, out=tmp_path / "none", options=QUIET
        ),
        "the labels themselves": lambda: poise.train(IMAGES, labels=NAMES[::-1], **swapped),
        "data.labels: True -> False": lambda: poise.train(IMAGES, **swapped),
    }
    for message, request in requests.items():
        with pytest.raises(InputError) as error:
            request()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_draws_a_class_and_keeps_labels_beside_codes(run, tmp_path, capsys):
    def poise_command(*words: str | Path) -> None:
        cli.parse([*map(str, words), "--device", "cpu"]).run()

    drawn = tmp_path / "drawn.npz"
    poise_command("sample", run.folder, "--label", "light", "-n", "3", "--out", drawn)
    expected = np.round(255 * run.sample(3, label="light")[:, 0].numpy())
    np.testing.assert_array_equal(np.load(drawn)["images"][..., 0], expected)
    assert "3 images of class light from prior flow" in capsys.readouterr().out
    poise_command("sample", run.folder, "--guidance", "2", "-n", "1", "--out", drawn)
    assert "all 2 classes, by their frequency" in capsys.readouterr().out
    np.savez(tmp_path / "some.npz", images=IMAGES[:5], labels=NAMES[:5])
    poise_command("encode", run.folder, tmp_path / "some.npz", "--out", tmp_path / "codes.npz")
    assert list(np.load(tmp_path / "codes.npz")["labels"]) == list(NAMES[:5])
    poise_command("encode", run.folder, tmp_path / "some.npz", "--out", tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["labels"]) == list(NAMES[:5])
