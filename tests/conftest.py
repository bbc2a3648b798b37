"""Check every call of the package in tests: shapes by jaxtyping, types by beartype.

Install the hook before importing `poise`: `poise.shapes` looks for jaxtyping in `sys.modules`.
Compiled code cannot be checked this way, so tests of torch.compile and of several processes run in
processes without the hook.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype

import forking

assert "poise" not in sys.modules, "poise was imported before the hook that checks its shapes"

_checker = types.ModuleType("poise_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a valid float
sys.modules["poise_checker"] = _checker
jaxtyping.install_import_hook("poise", "poise_checker.check")

# For networks this small a second thread costs more than it gains, above all on a busy machine.
torch.set_num_threads(1)
os.environ["POISE_CACHE"] = "off"  # features of images that are kept between tests hide faults
for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(name, "1")  # the same in the processes of the tests

# All its tests share one fixture, for which two processes train for 20 seconds.
LONG_FIXTURE = "test_several_processes.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the long fixture first.

    pytest-xdist workers steal tests from the end of another worker's share. Tests at the front stay
    together, so that only one worker builds the fixture.
    """
    items.sort(key=lambda item: item.path.name != LONG_FIXTURE)


SPECS = [
    "computed",
    "computed:power=1,decay=0.9",
    "released:image_size=64,latent_dim=64",
    "learned:start=0.5",
    "optimal",
    "fixed:beta=4",
    "scheduled:ramp_steps=3",
    "constrained:target_mse=0.05,rate=0.1",
    "controlled:target_kl=2,kp=0.1,ki=0.01",
]


@pytest.fixture(scope="session")
def all_specs() -> list[str]:
    """Return a specification of every kind of balance, for `make_balance`."""
    return SPECS


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> str:
    """Run the test once for each kind of balance."""
    return request.param


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _curves_are_drawn_once_for_each_kind_of_log() -> Iterator[None]:
    """Draw training.png once for each kind of log: drawing takes longer than a tiny training.

    A kind is what decides how a curve is drawn: the stages, the figures of each and their signs,
    and whether there is more than one entry.
    """
    from poise.runs import plots

    draw, drawn = plots.training_curves, dict[frozenset, bytes]()

    def once(log: Path) -> bytes:
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        kind = frozenset(
            (entry["stage"], min(entry["step"], 2), name, value > 0, value < float("inf"))
            for entry in entries
            for name, value in entry.items()
        )
        if kind not in drawn:
            drawn[kind] = draw(log)
        return drawn[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training_curves", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _steps_that_repeat_others_are_checked_now_and_then() -> Iterator[None]:
    """In a training loop, check the types of the first 20 steps and of every tenth after them.

    The checks take twice as long as a step of a tiny network.
    """
    from poise.training import loop

    fetched_ahead, lock = loop.fetched_ahead, threading.Lock()
    running, off = 0, False  # loops in all threads; whether the test itself turned the checks off

    def disable(disabled: bool) -> None:
        jaxtyping.config.update("jaxtyping_disable", disabled)

    def steps(batches: Iterator) -> Iterator:
        for number, batch in enumerate(batches):
            disable(off or not (number < 20 or number % 10 == 9))  # the tenth may write a log entry
            yield batch

    @contextmanager
    def now_and_then(*arguments) -> Iterator[Iterator]:
        nonlocal running, off
        with lock:
            off = off if running else jaxtyping.config.jaxtyping_disable
            running += 1
        try:
            with fetched_ahead(*arguments) as batches:
                yield steps(batches)
        finally:
            with lock:
                running -= 1
                disable(off)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fetched_ahead", now_and_then)
        yield


@pytest.fixture
def unchecked():
    """Turn off the checks, so that errors are those that a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def torch_fidelity() -> types.ModuleType:
    """Return the module torch-fidelity, for comparison.

    Its algebra needs no torchvision: if that is missing, a mock replaces it.
    """
    if find_spec("torch_fidelity") is None:
        pytest.skip('torch-fidelity is missing: "make test" installs it')
    if find_spec("torchvision") is not None:
        return importlib.import_module("torch_fidelity")
    datasets = types.SimpleNamespace(
        CIFAR10=object, CIFAR100=type("CIFAR100", (), {}), STL10=type("STL10", (), {})
    )
    stand_in = {
        "torchvision": MagicMock(),
        "torchvision.datasets": datasets,
        "torchvision.transforms": MagicMock(),
        "torchvision.transforms.functional": MagicMock(),
    }
    with patch.dict(sys.modules, stand_in):  # only here: others would use the mock
        module = importlib.import_module("torch_fidelity")
        loaded = {name: kept for name, kept in sys.modules.items() if name.startswith("torch_fid")}
    sys.modules.update(loaded)
    return module


@pytest.fixture
def run_python():
    """Return a function that runs code in a clean interpreter, without hooks.

    The code can import the package and the test modules. It takes two seconds to import torch:
    `run_forked` saves them in tests of something else than imports.
    """

    def run(code: str, *args: str) -> str:
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        command, environment = (
            [sys.executable, "-c", code, *args],
            os.environ | {"PYTHONPATH": path},
        )
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_forked(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs code in a fork of a process without hooks."""
    return lambda code, *args: forking.run(code, ["-c", *args], tmp_path)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a finished and evaluated run of two stages on 60 images. Tests do not change it."""
    import poise

    folder = tmp_path_factory.mktemp("runs") / "small"
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    options = poise.Options(device="cpu", quiet=True, threads=1)
    settings = {"recipe": "digits", "latent_dim": 3, "epochs": 1, "second_epochs": 1}
    run = poise.train(images, out=folder, options=options, batch_size=20, **settings)
    evaluation = run.evaluate(extractor="pixels", nll_samples=2)
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json()))
    return run
