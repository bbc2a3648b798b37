"""Test that one declaration of a setting serves the command, `poise.train` and config.json."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poise
from poise import cli
from poise.errors import InputError
from poise.recipes import CHANGES, RECIPES
from poise.recipes.settings import (
    DECLARED,
    OF_ONE_RUN,
    Changes,
    Data,
    Network,
    Recipe,
    Stage,
    options_of,
    to_json,
)
from poise.studies.comparison import comparing

VALUES: dict[str, Any] = {
    "size": 16,
    "channels": 3,
    "skip_unreadable": True,
    "flips": True,
    "labels": True,
    "levels": 4095,
    "max_megapixels": 200,
    "stream": True,
    "validation": 0.25,
    "latent_dim": 7,
    "latent_channels": 7,
    "batch_size": 11,
    "learning_rate": 0.003,
    "balance": "learned",
    "error": "absolute",
    "objective": "rae-l2",
    "ema_decay": 0.9,
    "standardise": "after",
    "patience": 3,
    "precision": "ieee",
    "seed": 5,
    "minutes": 2.5,
    "network": "wae",
    "second": "flow",
    "second_balance": "optimal",
    "stages": 1,
    "epochs": 13,
    "second_epochs": 17,
}
"""One value of each setting that no recipe has."""
NEEDED = {"latent_channels": {"network": "conv"}, "patience": {"validation": 0.1}}
"""Other changes that a setting needs."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.fixture
def help_of(monkeypatch) -> Callable[..., str]:
    """Return a function that gives a command's help: raw, or as one line without frames."""

    def shown(*arguments: str, columns: int = 80, raw: bool = False) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal = io.TextIOWrapper(
            io.BytesIO(), encoding="utf-8"
        )  # the frames need this spelling of the encoding
        with pytest.raises(SystemExit) as exit, contextlib.redirect_stdout(terminal):
            cli.parse([*arguments, "--help"])
        assert not exit.value.code
        terminal.seek(0)
        text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.read())
        return text if raw else " ".join(text.replace("│", " ").split())

    return shown


def option_names(command: str) -> set[str]:
    return set(cli.option_names(cli.with_options(None)[command]))


def test_an_invented_setting_is_declared_in_one_place(tmp_path):
    """A new setting needs only one line in a class and one in its docstring.

    Tested in a copy of the package.
    """
    package = Path(poise.__file__).parent
    shutil.copytree(package, tmp_path / "poise", ignore=shutil.ignore_patterns("__pycache__"))
    declaration = tmp_path / "poise" / "recipes" / "settings.py"
    source = declaration.read_text()
    for old, new in {
        '"float32"\n\n': '"float32"\n    wing_span: Annotated[float, Option("training")] = 0.25\n\n',
        "        precision: arith": "        wing_span: span in metres.\n        precision: arith",
    }.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    declaration.write_text(source)
    code = """
import json, sys
import numpy as np
import poise
from poise import cli
images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
quick = {"network": "mlp", "latent_dim": 2, "epochs": 1, "second_epochs": 1, "batch_size": 8}
options = poise.Options(device="cpu", quiet=True)
run = poise.train(images, out="run", options=options, wing_span=2.5, **quick)
assert run.recipe.first.wing_span == run.recipe.second.wing_span == 2.5
try:
    poise.train(images, out="run", options=options, wing_span=3.5, **quick)
except poise.InputError as error:
    assert "first.wing_span: 2.5 -> 3.5; second.wing_span: 2.5 -> 3.5" in str(error), error
else:
    raise AssertionError("another setting is another run")
assert cli.parse(["train", "digits", "--wing-span", "4"]).changes() == {"wing_span": 4}
assert cli.parse(["compare", "digits", "--wing-span", "4"]).changes() == {"wing_span": 4}
cli.parse(["train", "digits", "--help"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        # Without a home, matplotlib would read all fonts of the machine again.
        env={
            "PYTHONPATH": str(tmp_path),
            "COLUMNS": "100",
            "PATH": "",
            "HOME": str(Path.home()),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"--wing-span FLOAT\s+both stages: span in metres \(default: 0\.25\)", done.stdout
    )
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert recipe["first"]["wing_span"] == recipe["second"]["wing_span"] == 2.5


def test_every_setting_is_an_option_of_the_commands_that_can_use_it():
    assert set(VALUES) == set(CHANGES)
    around = set(options_of(poise.Options))
    assert around == {field.name for field in fields(poise.Options)} - {"quiet"}
    of_other_runs = {"more_epochs", "more_minutes", "start_from"}
    own = {"data", "out", "recipe"} | of_other_runs
    assert option_names("train") == own | set(CHANGES) | around
    assert option_names("compare") >= CHANGES.keys() - OF_ONE_RUN
    assert not option_names("compare") & (OF_ONE_RUN - {"second_balance"})
    for name in CHANGES.keys() - OF_ONE_RUN:
        comparing.base_recipe("digits", None, {name: VALUES[name], **NEEDED.get(name, {})})


@pytest.mark.parametrize("recipe", ["digits", "cifar10-released", "images-resnet"])
@pytest.mark.parametrize("name", VALUES)
def test_the_command_and_python_make_the_same_recipe(name, recipe):
    value = VALUES[name]
    needed = NEEDED.get(name, {})
    words = [flag(name)] if value is True else [flag(name), str(value)]
    words += [word for other in needed for word in (flag(other), str(needed[other]))]
    told = Changes(**cli.parse(["train", *words]).changes()).apply(RECIPES[recipe])
    changed = Changes(**{name: value}, **needed).apply(RECIPES[recipe])
    assert told == changed and changed != RECIPES[recipe]
    assert Changes(**{name: None}).apply(RECIPES[recipe]) == RECIPES[recipe]


def test_a_changed_recipe_has_the_value_where_it_is_declared():
    """A changed setting reaches every part of the recipe whose class declares it."""
    for declared in (Data, Network, Stage, Recipe):
        for name, option in options_of(declared).items():
            changed = Changes(**{name: VALUES[name]}, **NEEDED.get(name, {})).apply(
                RECIPES["mnist"]
            )
            parts = [changed, changed.data, changed.network, changed.first, changed.second]
            found = [getattr(part, name) for part in parts if isinstance(part, declared)]
            others = found[1:] if option.first_only else []
            assert all(value == VALUES[name] for value in found[: len(found) - len(others)]), name
            assert all(value != VALUES[name] for value in others), name


def test_numbers_of_numpy_become_those_of_python(unchecked):
    changed = Changes(seed=np.int64(3), learning_rate=np.float32(0.5), minutes=np.float64(2))
    recipe = changed.apply(RECIPES["digits"])
    stage = Stage(steps=np.int32(7))
    found = recipe.seed, recipe.first.learning_rate, stage.steps, poise.Options(threads=np.int8(2))
    assert json.dumps([*found[:3], found[3].threads]) == "[3, 0.5, 7, 2]"


def test_a_length_replaces_the_budget_of_a_recipe():
    budget = replace(RECIPES["digits"], minutes=20.0)
    assert Changes(epochs=3).apply(budget).minutes is None
    assert Changes(second_epochs=3).apply(budget).minutes is None
    assert Changes(batch_size=9).apply(budget).minutes == 20


def test_settings_around_a_run_reach_its_options():
    words = [
        "--device",
        "cuda:1",
        "--save-seconds",
        "2.5",
        "--tensorboard",
        "--engine",
        "compiled",
        "--threads",
        "3",
    ]
    expected = poise.Options("cuda:1", 2.5, tensorboard=True, engine="compiled", threads=3)
    assert cli.parse(["train", *words]).options() == expected
    assert cli.parse(["train"]).options() == poise.Options(threads=0)
    for option in ("--from", "--start-from"):
        assert str(cli.parse(["train", option, "runs/faces"]).start_from) == "runs/faces"


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("name", RECIPES)
def test_help_shows_the_values_of_the_recipe_of_the_data(command, name, help_of):
    recipe = RECIPES[name]
    chosen = ["--recipe", name] if recipe.data.source == "images" else [name]
    text = help_of(command, *chosen)
    assert recipe.second is not None
    rates = dict.fromkeys([str(recipe.first.learning_rate), str(recipe.second.learning_rate)])
    for option, default in {
        "latent-dim INT": (
            "that of the latent map" if recipe.network.kind == "conv" else recipe.network.latent_dim
        ),
        "network {resnet,infogan,wae,mlp,conv}": recipe.network.kind,
        "epochs INT": recipe.first.epochs or f"{recipe.first.steps:,} steps",
        "second-epochs INT": recipe.second.epochs or f"{recipe.second.steps:,} steps",
        "learning-rate FLOAT": " and ".join(rates),
    }.items():
        found = re.search(rf" --{re.escape(option)} .*?\(default: (.*?)\)", text)
        assert found and found[1] == str(default), option


def test_help_without_data_shows_what_all_recipes_share(help_of):
    text = help_of("train")
    assert re.search(r"--batch-size INT [^(]*\(default: the recipe's\)", text)
    assert re.search(r"--seed INT [^(]*\(default: 0\)", text)
    # Wrong input does not hide the help.
    assert help_of("train", "--recipe", "imagenet") == text
    assert re.search(r"--batch-size INT [^(]*\(default: 16 and 32\)", help_of("train", "photos/"))


def test_help_has_groups(help_of):
    text = help_of("train", raw=True)
    groups = re.split(r"─ (\w+) options ─", text)
    boxes = zip(groups[1::2], groups[2::2], strict=True)
    listed = {name: set(re.findall(r"│ --([a-z-]+)", box)) for name, box in boxes}
    assert set(listed) == {"data", "model", "training", "run"}
    assert listed["data"] == {
        "size", "channels", "flips", "labels", "skip-unreadable", "levels", "max-megapixels",
        "stream", "validation",
    }  # fmt: skip
    assert {"balance", "latent-dim", "network"} < listed["model"]
    assert {"batch-size", "epochs", "minutes", "seed"} < listed["training"]
    assert listed["run"] == {"device", "engine", "save-seconds", "tensorboard", "threads"}


@pytest.mark.parametrize("wanted", [True, False])
def test_help_on_a_terminal_has_no_colours_if_no_color_is_set(wanted, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if wanted else "1")
    with pytest.raises(SystemExit), contextlib.redirect_stdout(terminal):
        cli.parse(["train", "--help"])
    assert ("\x1b[" in terminal.getvalue()) == wanted


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_plain_names_of_values_and_fits(command, columns, help_of):
    text = help_of(command, columns=columns, raw=True)
    assert "{None}" not in text and "None," not in text and not re.search(r"\bSTR\b", text)
    boxes = [line for line in text.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert boxes and max(map(len, boxes)) <= columns


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("network", "vgg", "resnet, infogan, wae, mlp"),
        ("channels", 2, "1, 3"),
        ("batch_size", "many", "must be a whole number, not 'many'"),
        ("learning_rate", "fast", "must be a number, not 'fast'"),
        ("minutes", -1.0, "must be greater than 0, not -1.0"),
        ("ema_decay", 2.0, "must be between 0 and 1, not 2.0"),
    ],
)
def test_a_wrong_value_is_refused_alike(name, value, message, capsys, monkeypatch):
    with pytest.raises(InputError, match=f"^{name} .*{message}"):
        poise.train("digits", out="unused", **{name: value})
    monkeypatch.setattr(sys, "argv", ["poise", "train", "digits", flag(name), str(value)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and name in error.replace("-", "_")
    assert all(word in error for word in message.split(", ")), error


def test_an_unknown_setting_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"no setting wings; there are size, .*epochs"):
        poise.train("digits", out="unused", wings=2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stage(steps=True), "steps must be a whole number, not True"),
        (lambda: Stage(steps=1.5), "steps must be a whole number, not 1.5"),
        (lambda: Stage(steps=1, balance=3), "balance must be text, not 3"),
        (lambda: Stage(steps=1, learning_rate=None), "learning_rate must be a number, not None"),
        (
            lambda: Stage(steps=1, learning_rate=math.inf),
            "learning_rate must be finite, not inf",
        ),
        (
            lambda: Stage(steps=1, learning_rate=math.nan),
            "learning_rate must be greater than 0, not nan",
        ),
        (lambda: Data("x", skip_unreadable=1), "skip_unreadable must be True or False, not 1"),
        (lambda: poise.Options(engine="steam"), "engine must be one of auto, eager"),
        (lambda: poise.Options(threads="two"), "threads must be a whole number"),
        (lambda: Changes(minutes=1, epochs=2), "leave out either"),
        (lambda: Changes(stages=1, second_balance="computed"), "makes no sense with one stage"),
    ],
)
def test_a_value_of_another_type_is_refused(make, message, unchecked):
    with pytest.raises(InputError, match=message):
        make()


def test_config_json_holds_every_field_but_texts():
    settings = to_json(RECIPES["digits"])
    assert settings.keys() == {f.name for f in fields(Recipe)} - {"cost", "published"}
    for part, declared in {
        "data": Data,
        "network": Network,
        "first": Stage,
        "second": Stage,
    }.items():
        assert list(settings[part]) == [field.name for field in fields(declared)]


def test_every_option_has_a_help():
    for declared in (*DECLARED, poise.Options):
        texts = cli.options.help_texts(declared)
        assert all(texts.get(name) for name in options_of(declared))
