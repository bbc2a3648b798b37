"""Test the public names of the package, and which libraries it must not import."""

import doctest
import importlib
import importlib.metadata
import pkgutil

import numpy as np
import pytest
import torch

import poise
from poise.recipes import RECIPES
from poise.recipes.settings import Data, Generation, Network, Recipe, Stage, from_json, to_json
from poise.runs.build import first_stage, second_stage

SUBMODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(poise.__path__, "poise.")
    if name != "poise.__main__"
]


def test_all_is_what_can_be_had():
    assert all(getattr(poise, name) is not None for name in poise.__all__)
    assert dir(poise) == sorted(poise.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = poise.nonsense


def test_the_version_is_that_of_the_installed_package():
    assert poise.__version__ == importlib.metadata.version("poise")


def test_nothing_at_run_time_needs_the_installed_metadata(tmp_path, monkeypatch):
    """A package that runs from its source folder has no installed metadata."""

    find = importlib.metadata.Distribution.from_name

    def others_only(name):
        if name == "poise":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", others_only)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    options = poise.Options(device="cpu", quiet=True)
    settings = {"network": "mlp", "latent_dim": 2, "epochs": 1, "second_epochs": 1, "batch_size": 8}
    run = poise.train(images, out=tmp_path / "run", options=options, **settings)
    evaluation = run.evaluate(images, extractor="pixels")
    assert evaluation.to_json()["poise"] == poise.__version__
    page = poise.report.write_report([run.folder], tmp_path / "page.html", device="cpu")
    assert poise.__version__ in page.read_text(encoding="utf-8")


def test_a_balance_needs_torch_and_numpy_only(run_python):
    code = """
import sys, importlib.util
before = set(sys.modules)
import torch, numpy
with_torch = set(sys.modules)
import poise
poise.ComputedBalance(), poise.VAE, poise.networks
extra = {name.partition('.')[0] for name in set(sys.modules) - with_torch}
print(sorted(extra - set(sys.stdlib_module_names) - {'poise', 'torch', 'numpy'}))
"""
    assert run_python(code).strip() == "[]"


def test_training_on_the_digits_begins_without_the_slow_libraries(run_python, tmp_path):
    code = """
import sys
from poise.runs import pipeline
from poise.training import engines
def step(*arguments):
    slow = {'sklearn', 'scipy', 'PIL', 'matplotlib', 'pandas', 'datasets'}
    print(sorted(slow & set(sys.modules)))
    raise SystemExit
engines.training_step = step
pipeline.train("digits", out=sys.argv[1], options=pipeline.Options(quiet=True))
"""
    assert run_python(code, str(tmp_path / "run")).strip() == "[]"


@pytest.mark.parametrize("name", SUBMODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    globals_ = {"poise": poise, "torch": torch, **vars(module)}
    result = doctest.testmod(module, globs=globals_, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json_and_build(name):
    recipe = RECIPES[name]
    restored = from_json(Recipe, to_json(recipe))
    assert to_json(restored) == to_json(recipe)
    for stage in recipe.stages:
        poise.balance.make_balance(stage.balance, image_size=64, latent_dim=64)
    shape = {
        "digits": [1, 8, 8],
        "mnist": [1, 28, 28],
        "fashion-mnist": [1, 28, 28],
        "cifar10": [3, 32, 32],
    }
    first_stage(recipe, shape.get(recipe.data.source, [3, 64, 64]))


def test_released_recipes_have_the_released_sizes():
    def parameters(module):
        return sum(parameter.numel() for parameter in module.parameters())

    cifar, celeba = RECIPES["cifar10-released"], RECIPES["celeba64-released"]
    assert parameters(first_stage(cifar, [3, 32, 32])) == 5_190_467
    assert parameters(first_stage(celeba, [3, 64, 64])) == 19_321_667
    assert parameters(second_stage(cifar, first_stage(cifar, [3, 32, 32]))) == 17_457_344
    assert (
        cifar.first.total_steps(50_000) == 350_000 and cifar.second.total_steps(50_000) == 700_000
    )
    assert (
        113_800 < celeba.first.total_steps(162_770) < 114_000
        and 227_700 < celeba.second.total_steps(162_770) < 228_000
    )
    assert cifar.first.learning_rate_at(249 * 500, 50_000) == 1e-4
    assert cifar.first.learning_rate_at(250 * 500, 50_000) == 5e-5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stage(epochs=1, steps=1), "epochs or in steps"),
        (lambda: Stage(epochs=1, batch_size=1), "batch_size"),
        (lambda: Stage(steps=1, learning_rate=-1.0), "learning_rate"),
        (lambda: Stage(steps=1, ema_decay=1.0), "ema_decay"),
        (
            lambda: Stage(steps=1, precision="bf16"),
            "precision must be one of float32, ieee, bfloat16",
        ),
        (lambda: Generation(renormalise="allways"), "renormalise"),
        (lambda: Network("resnett"), "kind"),
        (lambda: Data("x", channels=2), "channels"),
        (lambda: Network("mlp"), "hidden"),
        (lambda: Network("resnet", hidden=(3,)), "hidden"),
        (lambda: Network("resnet", latent_dim=0), "latent_dim"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, unchecked):
    with pytest.raises(poise.InputError, match=message):
        make()
