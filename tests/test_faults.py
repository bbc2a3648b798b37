"""Test faults: damaged and hostile files, lost streams and folders, threads, signals."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import poise
from poise import cli
from poise.data.decoding import save_png
from poise.errors import InputError, RunError
from poise.features.weights import load_tensors
from poise.networks import mlp
from poise.recipes import Data, Network, Recipe, Stage
from poise.report.models import DataSetCache, exhibit
from poise.report.records import read_record, read_records
from poise.runs import checkpoint
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.runs.run import load
from poise.support import collectives, files, guards
from poise.support.progress import SafeStream, progress, warn
from poise.support.seeds import seeded
from poise.training import Watch, distributed, engines, fit, new_state
from poise.training.batches import VectorBatches
from poise.training.loop import may_draw
from poise.training.machine import choose_device
from poise.vae import VAE

KEPT = Path(__file__).parent / "data" / "run-of-2026-11-25"
IMAGES = np.load(KEPT / "images.npy")
QUIET = Options(device="cpu", quiet=True, save_seconds=0.0)  # a checkpoint after every step
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=2, hidden=(8,), second_hidden=8),
    first=Stage(steps=4, batch_size=10),
    second=Stage(steps=4, batch_size=10),
)


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a copy of the folder of a finished run."""
    return Path(shutil.copytree(KEPT / "run", tmp_path / "run"))


def change(path: Path, keys: str, value: object) -> None:
    """Change a value in a JSON file; `keys` names it as in "recipe.network.hidden"."""
    content = json.loads(path.read_text())
    *outer, last = keys.split(".")
    part = content
    for key in outer:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(content))


# Checkpoints


@pytest.mark.parametrize("name", ["5abc", "0000000040 copy", "0000000040.old", "99", "old"])
def test_a_stray_folder_is_no_checkpoint(name, run):
    shutil.copytree(run / "checkpoints" / "0000000020", run / "checkpoints" / name)
    loaded = load(run, device="cpu")
    assert loaded.finished and loaded.second is not None and loaded.position == "0000000040"


def test_a_copy_under_a_higher_number_is_as_old_as_its_original_and_is_kept(tmp_path):
    for position in (3, 7, 9):
        meta = {"stage": 1, "step": position, "seconds": 0.0, "finished": False}
        checkpoint.save_checkpoint(tmp_path, position, {}, meta)
        if position == 3:
            shutil.copytree(tmp_path / "0000000003", tmp_path / "9999999999")
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["9999999999", "0000000007", "0000000009"]
    saved, complaints = checkpoint.newest_intact_checkpoint(tmp_path)
    assert saved is not None and saved.meta["step"] == 9 and not complaints
    assert (tmp_path / "9999999999").is_dir()
    change(tmp_path / "0000000009" / "manifest.json", "meta.position", 8)  # damage, not a copy
    saved, complaints = checkpoint.newest_intact_checkpoint(tmp_path)
    assert saved is not None and saved.meta["step"] == 7 and len(complaints) == 1


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, '{"meta": 1, "sha256": 2}', '{"meta": {}, "sha256": {}}', "\xff", "fifo"],
)
def test_an_odd_manifest_leaves_the_checkpoint_before(content, run):
    manifest = run / "checkpoints" / "0000000040" / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest) if content == "fifo" else manifest.write_text(content, "latin-1")
    loaded = load(run, device="cpu")
    assert not loaded.finished and len(loaded.warnings) == 1


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    meta = {"stage": 1, "step": 1, "seconds": 0.0, "finished": False}
    folder, real = tmp_path / "codes", Path.replace
    checkpoint.write_folder(folder, {"mean": torch.zeros(2)}, meta)

    def held_open(path, target):
        if target == folder and not path.name.endswith("-old"):
            raise PermissionError(13, "held open by another process")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", held_open)
    with pytest.raises(RunError, match="cannot write"):
        checkpoint.write_folder(folder, {"mean": torch.ones(2)}, meta)
    assert not checkpoint.read_folder(folder).tensors["mean"].any()


@pytest.mark.parametrize("value", [{"stage": "x"}, {"stage": 3}, {"step": -1}, {"seconds": None}])
def test_a_checkpoint_of_no_position_is_damaged_even_with_right_hashes(value, tmp_path):
    meta = {"stage": 1, "step": 1, "seconds": 0.0, "finished": False}
    checkpoint.write_folder(tmp_path / "0000000001", {}, meta | value)
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        checkpoint.newest_intact_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("mean", torch.zeros(53, 2)),
        ("mean", torch.zeros(54, 2, dtype=torch.int64)),
        ("logvar", torch.full((54, 2), torch.nan)),
    ],
)
def test_codes_of_another_kind_are_damaged_even_with_right_hashes(name, codes, run):
    tensors = checkpoint.read_folder(run / "codes").tensors
    checkpoint.write_folder(run / "codes", tensors | {name: codes}, {})
    with pytest.raises(RunError, match=f"codes is damaged: {name}"):
        load(run, device="cpu").sample(1, prior="mixture")


def test_weights_that_are_not_finite_are_refused_even_with_right_hashes(run):
    for folder in checkpoint.checkpoints(run / "checkpoints"):
        saved = checkpoint.read_folder(folder)
        name = "stage1.vae.encoder.mean.weight"
        checkpoint.write_folder(
            folder, saved.tensors | {name: saved.tensors[name] * torch.inf}, saved.meta
        )
    with pytest.raises(InputError, match=r"mean\.weight .*other values than finite numbers"):
        load(run, device="cpu")


def test_a_mixture_is_saved_and_not_fitted_again(tmp_path, monkeypatch, capsys):
    def never(*arguments, **named):
        raise AssertionError

    trained = train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET)
    expected = trained.sample(4, prior="mixture")
    with monkeypatch.context() as patch:
        patch.setattr("poise.priors.mixture.fit_mixture", never)
        found = load(tmp_path / "run", device="cpu").sample(4, prior="mixture")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    saved = checkpoint.read_folder(tmp_path / "run" / "mixture")
    means = saved.tensors["means"]
    for odd in (
        {"weights": torch.zeros(0)},
        {"means": means * torch.nan},
        {"means": means.double()},
    ):
        checkpoint.write_folder(tmp_path / "run" / "mixture", saved.tensors | odd, saved.meta)
        found = load(tmp_path / "run", device="cpu").sample(4, prior="mixture")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert "fitting the mixture again" in capsys.readouterr().err


def test_a_run_ends_without_a_mixture_if_none_can_be_fitted(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise InputError("too many latents")

    monkeypatch.setattr("poise.priors.mixture.fit_mixture", refuse)
    train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET)
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "mixture").exists()


class Exploding(nn.Module):
    """An encoder some of whose variances are infinite in evaluation mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, images):
        mean, logvar = self.layer(images.flatten(1)).chunk(2, 1)
        return mean, logvar if self.training else logvar + 800 * (mean > 0)


def test_a_run_ends_whatever_its_codes(tmp_path):
    """Former defect: it failed after training, and so did each attempt to resume it."""
    vae = VAE(Exploding(), mlp((1, 8, 8), 2, hidden=(16,))[1])
    recipe = replace(TINY, second=None)
    run = train(IMAGES, recipe=recipe, vae=vae, out=tmp_path / "run", options=QUIET)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert "latents" not in summary and "no statistics of the latents" in str(summary["notes"])
    evaluation = run.evaluate(IMAGES[:20], extractor="pixels")
    assert any(note.startswith("no GEN-mixture: no mixture can be") for note in evaluation.notes)


def test_an_old_run_without_a_mixture_fits_it_and_stays_as_it_is(run):
    load(run, device="cpu").sample(1, prior="mixture")
    assert not (run / "mixture").exists()


# Settings, results and logs


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("recipe.network.hidden", [9], "does not fit the network of stage 1"),
        ("recipe.network.second_hidden", 9, "does not fit the network of stage 2"),
        ("recipe.network.hidden", 8, "network.hidden: Expected array, got int"),
        ("recipe.seed", {}, "seed: Expected int, got object"),
        ("recipe.network", None, "network: Expected object, got null"),
        ("recipe.first.steps", {"network": 1}, "first.steps: Expected int | null"),
        ("recipe.first", [], "first: Expected object, got array"),
        ("recipe", 3, "recipe: Expected object"),
        ("data.shape", [1, 8], "data.shape: Expected array of length 3"),
        ("data.shape", [1, -8, 8], "is not possible"),
        ("data.pixel_std", "0.3", "data.pixel_std: Expected float, got str"),
        ("data.checksum", 7, "data.checksum: Expected str, got int"),
        ("data.levels", "255", "data.levels: Expected int | null, got str"),
        ("data.levels", 0, "is not possible"),
        ("data.skipped", "x.png", "data.skipped: Expected array, got str"),
        ("data.pixel_std", float("inf"), "cannot be read as JSON"),
    ],
)
def test_a_config_of_other_types_is_one_line(keys, value, message, run):
    change(run / "config.json", keys, value)
    with pytest.raises(InputError) as caught:
        load(run, device="cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_whose_config_was_changed_does_not_go_on(run):
    recipe = load(run, device="cpu").recipe
    change(run / "config.json", "recipe.network.hidden", [9])
    with pytest.raises(InputError, match=r"other settings \(network.hidden"):
        train(IMAGES, recipe=recipe, out=run, options=QUIET)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("seed", {}),
        ("settings", []),
        ("settings.first.batch_size", {}),
        ("curves.1.mse", [1.0]),
        ("curves.1.mse", {}),
        ("evaluation.measurements", [{}]),
        ("evaluation.protocols", {}),
        ("evaluation.notes", 3),
        ("evaluation.reconstruction.mse", {}),
        ("evaluation.latents.variance_of_mean", ["x"]),
        ("evaluation.second_stage.aggregate.mean_norm", "x"),
        ("seconds.training", "long"),
        ("data.shape", None),
    ],
)
def test_a_strange_result_is_refused_alone_and_left_out_of_a_report(keys, value, tmp_path, capsys):
    good = Path(shutil.copy(KEPT / "results" / "kept-computed-0.json", tmp_path / "good.json"))
    (strange,) = [Path(shutil.copy(good, tmp_path / "strange.json"))]
    change(strange, "seed", 1)
    change(strange, keys, value)
    with pytest.raises(InputError, match=r"strange\.json"):
        poise.read_results([strange])
    (record,) = read_records([tmp_path])
    assert record.seed == 0 and "strange.json" in capsys.readouterr().err


def test_a_damaged_run_is_left_out_of_a_report_of_others(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    change(Path(other) / "config.json", "recipe.first", 1)
    (run / "summary.json").write_text('{"reconstruction": {"mse": {}}}')
    (record,) = read_records([tmp_path])
    assert record.folder == run and record.summary is None
    assert "other/config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "evaluation",
    [
        {"measurements": [{"metric": 3}]},
        {"protocols": []},
        {"notes": 3},
        {"latents": {"variance_of_mean": ["x"]}},
    ],
)
def test_a_strange_evaluation_is_left_out_of_a_report_and_not_shared(evaluation, run, tmp_path):
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert read_record(run).evaluation is None
    with pytest.raises(InputError, match=r"evaluation\.json"):
        load(run, device="cpu").save_pretrained(tmp_path / "shared")


def test_a_folder_whose_name_is_not_utf8_is_trained_on_and_shared(tmp_path):
    photos, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"r\xe9n")
    for number, image in enumerate(IMAGES[:12]):
        save_png(photos / f"{number}.png", image.reshape(8, 8, 1))
    train(photos, recipe=TINY, out=out, options=QUIET)
    again = load(out, device="cpu")
    assert again.recipe.data.source == str(photos)
    again.save_pretrained(tmp_path / "shared")
    assert "# r\\udce9n" in (tmp_path / "shared" / "README.md").read_text()
    with pytest.raises(InputError, match="cannot be read as JSON"):
        files.decode_json(b'["\\udce9", NaN]', list, "a.json")


def test_one_image_is_not_compared_with_others(run):
    with pytest.raises(InputError, match=r"1 real image cannot be compared .* at least 2"):
        load(run, device="cpu").evaluate(IMAGES[:1], extractor="pixels")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pictures_that_are_no_files_are_left_out_of_a_report(kind, run):
    shutil.rmtree(run / "checkpoints")  # so the kept pictures are shown
    for name in ("samples.png", "reconstructions.png", "progress.png"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name) if kind == "pipe" else (run / name).mkdir()
    shown = exhibit(read_record(run), DataSetCache(), "cpu")
    assert (shown.kept_samples, shown.kept_pairs, shown.progress) == (None, None, None)
    assert any("progress.png cannot be read" in sentence for sentence in shown.missing)


def test_a_damaged_log_is_plotted_without_its_damaged_lines(run):
    log = run / "metrics.jsonl"
    log.write_bytes(b"\xff\xfe\n" + log.read_bytes() + b'{"stage": 1}\n\xff')
    assert load(run, device="cpu").plot().width > 100
    log.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="nothing to plot"):
        load(run, device="cpu").plot()


def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, monkeypatch, capsys):
    def die(*arguments):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments)

    taken: list[int] = []
    step = engines.training_step
    train(IMAGES, recipe=TINY, out=tmp_path / "whole", options=QUIET)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engines, "training_step", die)
        train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET)
    log = tmp_path / "run" / "metrics.jsonl"
    odd = b'{"stage": 1}\n\xff\xfe\n[]\n{"stage": {}, "step": 1}\n' + b"[" * 100_000 + b"\n"
    log.write_bytes(log.read_bytes() + odd)
    again = train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET)
    assert "5 damaged lines" in capsys.readouterr().err
    whole = load(tmp_path / "whole", device="cpu")
    for name, tensor in whole.first.vae.state_dict().items():
        assert torch.equal(again.first.vae.state_dict()[name], tensor), name
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [1, 2, 3, 4] * 2


# Hostile folders


def test_nothing_is_written_through_a_link_and_no_pipe_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "known")
    target = tmp_path / "precious"
    target.write_text("mine")
    planted = files.temporary(tmp_path / "a.json")
    planted.symlink_to(target)
    with pytest.raises(RunError, match="cannot write"):
        files.write_json(tmp_path / "a.json", {})
    os.mkfifo(files.temporary(tmp_path / "b.json"))
    with pytest.raises(RunError, match="cannot write"):
        files.write_json(tmp_path / "b.json", {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(target)
    with (
        pytest.raises(InputError, match=r"its \.lock is a symbolic link"),
        guards.locked(tmp_path / "run"),
    ):
        pass
    os.mkfifo(tmp_path / "run" / "config.json")
    with pytest.raises(InputError, match="not a regular file"):
        load(tmp_path / "run")
    assert target.read_text() == "mine"


def test_names_of_temporary_files_cannot_be_predicted(tmp_path):
    assert len({files.temporary(tmp_path / "a") for _ in range(9)}) == 9


def test_a_folder_that_is_removed_in_mid_run_is_noticed_at_the_next_entry(tmp_path, monkeypatch):
    def take(*arguments):
        taken.append(1)
        if len(taken) == 2:
            shutil.rmtree(tmp_path / "run")
        return step(*arguments)

    taken: list[int] = []
    step = engines.training_step
    monkeypatch.setattr(engines, "training_step", take)
    rarely = Options(device="cpu", quiet=True)
    with pytest.raises(RunError, match=r"run was removed or renamed during training"):
        train(IMAGES, recipe=TINY, out=tmp_path / "run", options=rarely)
    assert len(taken) == 2 and not (tmp_path / "run").exists()


# Streams and signals


class Full:
    """A stream on a full disk."""

    def write(self, text: str = "") -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = fileno = write

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("kind", ["full", "closed", "absent"])
def test_work_goes_on_without_stderr(kind, tmp_path, monkeypatch):
    closed = open(tmp_path / "closed", "w")
    closed.close()
    stream = {"full": Full(), "closed": closed, "absent": None}[kind]
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("stage 1", 2) as display:
        display.update(2, {"loss": "1"})
    warn("nobody reads this")
    SafeStream(stream).finish()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_a_run_to_stop(number):
    guards._any_asked.clear()
    with guards.stop_signals() as stop:
        assert not stop() and not guards.any_asked()
        os.kill(os.getpid(), number)
        assert stop() and guards.any_asked()


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guards.stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_the_process_with_its_exit_code(monkeypatch):
    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(os, "write", lambda *arguments: None)
    before = signal.signal(signal.SIGINT, cli.interrupt)
    try:
        monkeypatch.setattr(cli, "any_asked", lambda: False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Ended, match="130"):
            os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, cli.interrupt)
        monkeypatch.setattr(cli, "any_asked", lambda: True)
        with pytest.raises(Ended, match="130"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# Training


def test_a_failed_step_leaves_the_statistics_of_batch_norm(tmp_path):
    class Exploding(nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.decoder, self.norm, self.left = decoder, nn.BatchNorm1d(2), 3
            self.seen: list[torch.Tensor] = []

        def forward(self, latents):
            if self.training:
                self.seen.append(self.norm.running_mean.clone())
                self.left -= 1
            return self.decoder(self.norm(latents if self.left >= 0 else latents * torch.nan))

    encoder, decoder = poise.networks.mlp((1, 8, 8), 2, hidden=(8,))
    vae = VAE(encoder, Exploding(decoder))
    with pytest.raises(RunError, match="weights did not change"):
        train(IMAGES, recipe=TINY, vae=vae, out=tmp_path / "run", options=QUIET)
    assert len(vae.decoder.seen) == 4
    assert torch.equal(vae.decoder.norm.running_mean, vae.decoder.seen[-1])
    assert int(vae.decoder.norm.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("ema_decay", "name"), [(None, "weight"), (0.9, "weight"), (None, "running_var")]
)
def test_weights_that_became_infinite_are_not_saved(ema_decay, name, tmp_path, monkeypatch):
    def overflow(state, *others):
        step(state, *others)
        if len(taken) == 2:
            tensors = state.trained.state_dict()
            next(tensors[key] for key in tensors if key.endswith(name))[0] = torch.inf
        taken.append(1)

    taken: list[int] = []
    step = engines.training_step
    network = TINY.network if name == "weight" else Network("resnet", 2, second_hidden=8)
    recipe = replace(TINY, network=network, first=replace(TINY.first, ema_decay=ema_decay))
    with monkeypatch.context() as patch, pytest.raises(RunError, match="not finite at step 3 of"):
        patch.setattr(engines, "training_step", overflow)
        train(IMAGES, recipe=recipe, out=tmp_path / "run", options=QUIET)
    saved, _ = checkpoint.newest_intact_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.meta["step"] == 2
    again = train(IMAGES, recipe=recipe, out=tmp_path / "run", options=QUIET)
    whole = train(IMAGES, recipe=recipe, out=tmp_path / "whole", options=QUIET)
    for name, tensor in whole.first.vae.state_dict().items():
        assert torch.equal(again.first.vae.state_dict()[name], tensor), name


def test_threads_that_train_at_once_get_the_numbers_that_each_would_get_alone():
    """Also of a network with dropout, which draws from the one global generator."""

    def weights(seed: int) -> torch.Tensor:
        with seeded(seed):
            encoder, decoder = poise.networks.mlp(4, 2, hidden=(8,), output="linear")
        vae = VAE(nn.Sequential(nn.Dropout(0.3), encoder), decoder)
        stage = Stage(steps=40, batch_size=10)
        state = new_state(vae, poise.ComputedBalance(), stage, choose_device("cpu"))
        data = VectorBatches(torch.linspace(0, 1, 200).reshape(50, 4), torch.device("cpu"))
        fit(state, data, stage, number=1, seed=seed, watch=Watch(quiet=True))
        return nn.utils.parameters_to_vector(state.network.parameters()).detach()

    def work(seed: int) -> None:
        found[seed] = weights(seed)

    expected, found = [weights(seed) for seed in range(4)], {}
    before = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "draws"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), False),
        (lambda: VAE(*poise.networks.resnet(32, 3, 4, scales=2)), False),
        (lambda: nn.Sequential(nn.Dropout2d(0.1)), True),
        (lambda: type("Own", (nn.Linear,), {"__module__": "elsewhere"})(2, 2), True),
    ],
)
def test_only_networks_that_may_draw_use_the_global_generator(network, draws):
    assert may_draw(network()) == draws


@pytest.mark.usefixtures("unchecked")
def test_a_recorded_step_uses_streams_of_the_device_of_its_batch(monkeypatch):
    asked: list[object] = []

    class Stream:
        def __init__(self, device):
            asked.append(device)

        def wait_stream(self, other):
            pass

    def current(device):
        return Stream(device)

    class Batch:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    engines.CapturedStep(lambda *arguments: None)(None, Batch(), None, None)
    assert asked == [Batch.device] * 2


# Several processes


class Waiting:
    """An all-reduce that never ends: its first wait has a limit, its second one is the group's."""

    waits = 0

    def wait(self, limit=None):
        self.waits += 1
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")

    def is_completed(self):
        return self.waits > 1


def test_a_balance_on_one_rank_alone_says_so_and_ends_at_the_time_out(monkeypatch, capsys):
    work = Waiting()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *arguments, **named: work)
    with pytest.raises(RunError, match="process_group=False"):
        collectives.sum_over_ranks(torch.zeros(1))
    assert work.waits == 2 and "process_group=False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RunError("cannot write /data/gloo/run: disk full"), False),
        (RuntimeError("no kernel for /data/gloo/run"), False),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:538] Connection closed by peer"), True),
    ],
)
def test_only_errors_of_gloo_are_lost_contact(error, lost, monkeypatch):
    monkeypatch.setattr(distributed, "is_up", lambda: True)
    monkeypatch.setattr(distributed, "launched", lambda: True)
    with pytest.raises(RuntimeError) as caught, distributed.processes(torch.device("cpu")):
        raise error
    assert ("lost contact" in str(caught.value)) == lost


# Weights


def test_no_advice_to_load_code_is_passed_on(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "odd.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    for name in ("odd.pth", "number.pth"):
        with pytest.raises(InputError, match="not a file of weights") as caught:
            load_tensors(tmp_path / name)
        assert "weights_only" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("", "gone.pth", "pipe.pth"):
        with pytest.raises(InputError, match=r"not a file of weights|named pipe"):
            load_tensors(tmp_path / name)
