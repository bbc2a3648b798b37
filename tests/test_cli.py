"""Test the command with right and wrong input: one line and an exit code for each."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast, get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import forking
from poise import Run, cli, load
from poise.cli.images import images_for, picture_for
from poise.cli.options import ReadingOptions
from poise.cli.showing import show_cells, show_table
from poise.data import read_images
from poise.data.decoding import crop_and_resize, jpeg_round_trip, square_resize, to_bytes
from poise.errors import InputError
from poise.recipes import Data
from poise.recipes.settings import Changes
from poise.runs import checkpoint, checkup, pipeline
from poise.support import files, guards
from poise.training import Engine

RANDOM = np.random.default_rng(0)
QUICK = ["--epochs", "1", "--second-epochs", "1", "--batch-size", "8", "--device", "cpu"]


def poise(*arguments: str | Path) -> None:
    cli.parse([str(argument) for argument in arguments])
    sys.argv = ["poise", *map(str, arguments)]
    cli.main()


def photos(folder: Path, *, of: list[tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(of):
        pixels = RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    return folder


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["poise"])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["poise"])
        poise("train", "digits", "--out", folder, *QUICK)
    return folder


def test_train_ends_with_a_table_and_pictures(capsys, tmp_path):
    photos(tmp_path / "photos", of=[(20, 30)] * 12)
    poise(
        "train",
        "photos",
        "--size",
        "8",
        "--network",
        "mlp",
        "--latent-dim",
        "4",
        "--second",
        "vae",
        "--out",
        "run",
        *QUICK,
    )
    out = capsys.readouterr().out
    assert (
        "MSE (per dimension)" in out
        and "training codes: Var(mu) + E[s^2]" in out
        and "stage 2: gamma2" in out
    )
    assert all(
        min(size(tmp_path / "run" / name)) > 8
        for name in ("samples.png", "reconstructions.png", "training.png")
    )
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (
        settings["data"]["source"] == str(tmp_path / "photos") and settings["first"]["epochs"] == 1
    )


@pytest.mark.parametrize("out", ["grid.png", "array.npz", "folder"])
def test_sample_writes_a_grid_an_array_or_a_folder(out, run_folder, tmp_path):
    poise("sample", run_folder, "-n", "5", "--out", out, "--first", "2", "--prior", "mixture")
    if out == "grid.png":
        assert size(Path(out)) == (3 * 66 - 2, 2 * 66 - 2)
    elif out == "array.npz":
        assert np.load(out)["images"].shape == (5, 8, 8, 1)
    else:
        assert sorted(path.name for path in Path(out).iterdir()) == [
            f"{k:06d}.png" for k in range(2, 7)
        ]


def test_reconstruct_shows_test_images_or_ones_own(run_folder, tmp_path, capsys):
    poise("reconstruct", run_folder, "-n", "4")
    assert size(Path("reconstructions.png")) == (8 * 66 - 2, 64)
    np.save("own.npy", RANDOM.integers(0, 256, (3, 8, 8), dtype=np.uint8))
    poise("reconstruct", run_folder, "own.npy", "--out", "own.npz")
    assert np.load("own.npz")["images"].shape == (3, 8, 8, 1)
    assert "3 images" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["walk.png", "walk.gif"])
def test_interpolate_walks_from_one_picture_to_another(out, run_folder, tmp_path, capsys):
    folder = photos(tmp_path / "own", of=[(20, 30), (8, 8)])
    poise(
        "interpolate",
        run_folder,
        folder / "00.jpg",
        folder / "01.jpg",
        "--out",
        out,
        "--steps",
        "5",
    )
    assert capsys.readouterr().out.startswith("5 images from ")
    with Image.open(out) as walk:
        assert walk.size == ((5 * 66 - 2, 64) if out == "walk.png" else (64, 64))
        walk.seek(0)
        shown = np.asarray(walk.convert("L"))[::8, :64:8]
    run = load(run_folder)
    first = read_images(folder / "00.jpg", size=8, channels=1)
    expected = to_bytes(run.reconstruct(first))[0, 0].numpy()
    assert np.abs(shown.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("source", "jpeg"), [("celeba64", None), ("celeba", None), ("photos", 75)])
def test_pictures_to_interpolate_are_prepared_as_those_of_the_run(
    source, jpeg, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    path = photos(tmp_path / "own", of=[(178, 218)]) / "00.jpg"
    recipe = SimpleNamespace(data=Data(source, jpeg_quality=jpeg))
    run = cast(Run, SimpleNamespace(data={"shape": [3, 64, 64]}, recipe=recipe, levels=None))
    with Image.open(path) as picture:
        crop = square_resize if source == "photos" else crop_and_resize
        expected = torch.from_numpy(np.array(crop(picture, size=64))).permute(2, 0, 1)
    if jpeg is not None:
        expected = jpeg_round_trip(expected[None], jpeg)[0]
    assert torch.equal(picture_for(run, path), expected)


def test_masks_to_interpolate_have_the_white_of_the_run(tmp_path):
    mask = np.eye(8, dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    recipe = SimpleNamespace(data=Data("masks"))
    run = cast(Run, SimpleNamespace(data={"shape": [1, 8, 8]}, recipe=recipe, levels=1))
    np.testing.assert_array_equal(picture_for(run, tmp_path / "mask.png")[0], 255 * mask)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["00.jpg", "01.jpg", "--out", "walk.mp4"], r"walk.mp4: give a .png .* or a .gif"),
        (["00.jpg", "01.jpg", "--steps", "1"], r"steps must be from 2 to 1000, not 1"),
        (["00.jpg", "text.jpg"], r"text.jpg cannot be decoded: not an image of a known format"),
        (["gone.jpg", "01.jpg"], r"gone.jpg does not exist"),
        (["00.jpg", "small.png"], r"small.png has 9x7 pixels.*8x8: give a larger picture"),
    ],
)
def test_what_interpolate_cannot_do_is_one_line(arguments, expected, run_folder, tmp_path, capsys):
    folder = photos(tmp_path / "own", of=[(20, 30), (8, 8)])
    (folder / "text.jpg").write_text("no image")
    Image.new("L", (9, 7)).save(folder / "small.png")
    a, b, *options = arguments
    with pytest.raises(SystemExit) as exit:
        poise("interpolate", run_folder, folder / a, folder / b, *options)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and len(error.splitlines()) == 1 and re.search(expected, error)


def test_titles_of_tables_are_shown_as_they_are(capsys):
    show_table("runs/faces[old]", [("[MSE]", "1")])
    show_cells("runs/faces[old]", [["", "[MB]"], ["a", "1"]])
    shown = "".join(capsys.readouterr().out.split())  # a title may be wrapped
    assert shown.count("runs/faces[old]") == 2 and "[MSE]" in shown and "[MB]" in shown


def test_a_set_drawn_in_parts_is_the_set(run_folder, capsys):
    poise("sample", run_folder, "-n", "250", "--out", "whole.npz")
    poise("sample", run_folder, "-n", "130", "--first", "120", "--out", "rest.npz")
    np.testing.assert_array_equal(
        np.load("whole.npz")["images"][120:], np.load("rest.npz")["images"]
    )
    assert "images 250/250" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--seed", "5"], {"seed": 5}),
        (["--noise", "off"], {"second_stage_noise": False}),
        (["--noise", "on"], {"second_stage_noise": True}),
        (["--renormalise", "always"], {"renormalise": "always"}),
        (["--adjust-variance", "on"], {"adjust_variance": True}),
        (["--prior", "normal", "--adjust-variance", "off"], {"prior": "normal"}),
    ],
)
def test_options_of_sample_are_those_of_python(options, settings, run_folder):
    poise("sample", run_folder, "-n", "5", "--out", "drawn.npz", *options)
    run = load(run_folder)
    own = {name: settings[name] for name in ("seed", "prior") if name in settings}
    others = {name: value for name, value in settings.items() if name not in own}
    expected = run.sample(5, generation=replace(run.recipe.generation, **others), **own)
    with np.load("drawn.npz") as drawn:
        np.testing.assert_array_equal(drawn["images"], to_bytes(expected).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--more-epochs", "3", "--out", "x"], {"more_epochs": 3, "out": Path("x")}),
        (["--more-minutes", "2.5", "--out", "x"], {"more_minutes": 2.5, "out": Path("x")}),
        (["photos", "--from", "runs/x"], {"start_from": "runs/x"}),
        (["photos", "--balance", "learned", "--epochs", "2"], {"balance": "learned", "epochs": 2}),
    ],
)
def test_options_of_train_are_arguments_of_python(options, settings, monkeypatch):
    trained = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(pipeline, "train", trained)
    with pytest.raises(SystemExit) as exit:
        poise("train", *options)
    given = {name: value for name, value in trained.call_args.kwargs.items() if value is not None}
    assert given.pop("options") and given == settings and exit.value.code == 130
    assert trained.call_args.args == (options[0] if options[0] == "photos" else None,)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_outside_training_ends_a_command_with_its_exit_code(number, code, monkeypatch):
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {one: signal.getsignal(one) for one in signals}
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: os.kill(os.getpid(), number))
    monkeypatch.setattr(guards, "_any_asked", threading.Event())
    try:
        with pytest.raises(SystemExit) as exit:
            poise("train", "digits")
        assert exit.value.code == code
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_encode_writes_the_posteriors_of_test_images_or_of_ones_own(run_folder, capsys):
    run = load(run_folder)
    poise("encode", run_folder, "--out", "codes.npz")
    expected = run.encode(run.test_images())
    with np.load("codes.npz") as codes:
        np.testing.assert_array_equal(codes["mean"], expected.mean)
        np.testing.assert_array_equal(codes["logvar"], expected.logvar)
        scaling_factor = float(codes["scaling_factor"])
    np.save("own.npy", RANDOM.integers(0, 256, (3, 8, 8), dtype=np.uint8))
    poise("encode", run_folder, "own.npy", "--out", "own.safetensors")
    assert load_file("own.safetensors")["mean"].shape == (3, 10)
    with safe_open("own.safetensors", "np") as file:
        saved = {name: json.loads(value) for name, value in file.metadata().items()}
    scale = json.loads((Path(run_folder) / "latents.json").read_text())
    assert scale.items() <= saved.items()
    assert saved["scaling_factor"] == scaling_factor and saved["latent_shape"] == [10]
    out = capsys.readouterr().out
    assert "3 codes: own.safetensors" in out and f"scaling_factor {scaling_factor:.4g}" in out


def test_every_image_of_a_folder_is_encoded_and_named(run_folder, tmp_path, capsys):
    for side, number in (("train", 5), ("val", 3), ("test", 4)):
        photos(tmp_path / "x" / side, of=[(9, 9)] * number)
    (tmp_path / "x" / "val" / "01.jpg").write_text("no image")
    poise("encode", run_folder, "x", "--skip-unreadable")
    out = capsys.readouterr().out
    assert "11 codes (4 test, 5 train, 2 val): codes.npz" in out
    assert "note: skipped: x/val/01.jpg cannot be decoded" in out
    with np.load("codes.npz") as codes:
        sides, names = codes["sides"].tolist(), codes["names"].tolist()
        row = names.index("val/02.jpg")
        assert (sides[row], sides.count("train"), len(codes["mean"])) == ("val", 5, 11)
        mean = codes["mean"][row]
    poise("encode", run_folder, "x/val/02.jpg", "--out", "one.safetensors")
    np.testing.assert_allclose(load_file("one.safetensors")["mean"][0], mean, atol=1e-6)
    with safe_open("one.safetensors", "np") as file:
        assert json.loads(file.metadata()["names"]) == ["x/val/02.jpg"]
    poise("reconstruct", run_folder, "x", "--skip-unreadable", "-n", "20")
    assert "11 images (4 test, 5 train, 2 val): " in capsys.readouterr().out


def test_a_run_encodes_with_the_scale_of_its_training(run_folder, tmp_path):
    copy = Path(shutil.copytree(run_folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["data"]["levels"] = 4095
    (copy / "config.json").write_text(json.dumps(config))
    values = RANDOM.integers(0, 200, (3, 8, 8)).astype(np.uint16)
    (tmp_path / "scope").mkdir()
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "scope" / f"{number}.tif")
    expected = np.floor(values * (255 / 4095) + 0.5).astype(np.uint8)
    poise("encode", copy, "scope")
    with np.load("codes.npz") as codes:
        np.testing.assert_array_equal(codes["mean"], load(copy).encode(expected).mean)


def test_a_run_on_dark_images_is_warned_about_and_keeps_its_scale(tmp_path, capsys):
    (tmp_path / "scope").mkdir()
    for number, pixels in enumerate(RANDOM.integers(0, 4096, (30, 8, 8)).astype(np.uint16)):
        Image.fromarray(pixels).save(tmp_path / "scope" / f"{number}.tif")
    how = ["--network", "mlp", "--latent-dim", "4", "--stages", "1", "--epochs", "1"]
    how += ["--batch-size", "8", "--device", "cpu", "--threads", "1", "--out", "run"]
    poise("train", "scope", "--levels", "65535", *how)
    told = capsys.readouterr()
    warning = "check the range: the images use only the values from 0 to 16 of 0 to 255"
    assert f"poise: warning: {warning}" in told.err and f"note: {warning}" in told.out
    # A run of an earlier version has no such key, and its images had this scale.
    config = json.loads(Path("run/config.json").read_text())
    assert config["data"].pop("levels") == 65535
    config["recipe"]["data"].pop("levels")
    Path("run/config.json").write_text(json.dumps(config))
    assert load("run").dataset().checksum == config["data"]["checksum"]
    poise("train", "scope", *how)
    assert load("run").levels == 65535


def test_sets_are_compared_with_their_notes(tmp_path, capsys):
    photos(tmp_path / "x" / "test", of=[(9, 9)] * 4)
    photos(tmp_path / "x" / "train", of=[(9, 9)] * 2)
    (tmp_path / "x" / "test" / "bad.png").write_text("no image")
    sets = ["--real", "x", "--generated", "x/test", "--size", "8", "--extractor", "pixels"]
    with pytest.raises(SystemExit):
        poise("evaluate", *sets)
    assert capsys.readouterr().err.rstrip().endswith("or pass --skip-unreadable")
    poise("evaluate", *sets, "--skip-unreadable")
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[0] == "real images: x: 4 of 6 images, those for test"
    assert [note.split(" ")[0:3:2] for note in notes[1:3]] == [
        ["real", "skipped:"],
        ["generated", "skipped:"],
    ]


def test_any_name_of_a_file_can_be_printed():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    cli.print_any_name(stream)
    print(os.fsdecode(b"caf\xe9.png"), file=stream, flush=True)
    assert stream.buffer.getvalue() == b"caf\\udce9.png\n"


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    run_folder, tmp_path, tmp_path_factory
):
    code = """
import resource
from poise.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""
    command = ["poise", "sample", str(run_folder), "-n", "2000", "--out", "big.npz"]
    forked = forking.start(code, command, tmp_path_factory.mktemp("printed"))
    assert forked.end() == 1 and not list(tmp_path.iterdir())
    lines = forked.err.read_text().splitlines()
    errors = [line for line in lines if not line.startswith("images ")]
    assert len(errors) == 1 and errors[0].startswith("poise: error: cannot write big.npz")


@pytest.mark.parametrize("number", [1, 3])
def test_a_handful_of_pictures_is_enough_to_reconstruct(number, run_folder, tmp_path, capsys):
    folder = photos(tmp_path / "own", of=[(20, 30)] * number)
    poise(
        "reconstruct",
        run_folder,
        folder / "00.jpg" if number == 1 else folder,
        "--out",
        "pairs.png",
    )
    assert capsys.readouterr().out.startswith("1 image:" if number == 1 else "3 images:")


@pytest.mark.parametrize("options", [["-n", "0"], ["--out", "movie.mp4"], ["--out", "file"]])
@pytest.mark.parametrize("command", ["sample", "reconstruct"])
def test_what_cannot_be_written_is_said_before_work_is_done(
    command, options, run_folder, capsys, tmp_path
):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit:
        poise(command, run_folder, *options)
    assert exit.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_memory_that_does_not_suffice_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def hungry(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pipeline, "train", hungry)
    with pytest.raises(SystemExit) as exit:
        poise("train", *QUICK)
    assert exit.value.code == 1 and "not enough memory" in capsys.readouterr().err


def test_an_error_that_only_mentions_memory_keeps_its_trace(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pipeline, "train", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        poise("train", *QUICK)


def test_pictures_to_encode_are_prepared_as_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = photos(tmp_path / "own", of=[(178, 218), (60, 90)])
    recipe = SimpleNamespace(data=Data("celeba64", jpeg_quality=75))
    run = SimpleNamespace(data={"shape": [3, 32, 32]}, recipe=recipe, levels=None, classes=())
    found = images_for(cast(Run, run), str(folder), ReadingOptions()).images
    for image, path in zip(found, sorted(folder.iterdir()), strict=True):
        assert torch.equal(image, picture_for(cast(Run, run), path))
    with pytest.raises(InputError, match=r"--levels and .* are for images that you give"):
        images_for(cast(Run, run), None, ReadingOptions(levels=9))


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as exit:
        poise("--version")
    assert not exit.value.code and capsys.readouterr().out.startswith("poise 0.")


def test_weights_that_are_not_there_are_refused(run_folder, capsys):
    with pytest.raises(SystemExit) as exit:
        poise("evaluate", run_folder, "--extractor", "nope.pt")
    assert exit.value.code == 2 and "nope.pt" in capsys.readouterr().err


def test_evaluation_is_json_on_stdout_with_progress_on_stderr(run_folder, capsys):
    poise("evaluate", run_folder, "--extractor", "pixels", "--nll-samples", "5")
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert {m["of"] for m in values["measurements"]} == {
        "REC",
        "model",
        "GEN-1",
        "GEN-2",
        "GEN-mixture",
    }
    assert "GEN-2 180/180" in err and values == json.loads(
        (run_folder / "evaluation.json").read_text()
    )


def test_options_of_evaluate_reach_the_evaluation(run_folder, capsys):
    poise("evaluate", run_folder, "--extractor", "pixels", "--infinity", "--seed", "3")
    values = json.loads(capsys.readouterr().out)
    assert any("extrapolate" in note for note in values["notes"])
    assert {m["seed"] for m in values["measurements"] if m["of"] == "GEN-2"} == {3}


@pytest.mark.parametrize("protocol", ["default", "50k-train"])
def test_evaluate_can_be_told_how_many_images(protocol, run_folder, capsys):
    poise("evaluate", run_folder, "--extractor", "pixels", "--images", "50", "--protocol", protocol)
    values = json.loads(capsys.readouterr().out)
    compared = [p for p in values["protocols"].values() if p["extractor"] == "pixels"]
    assert {(p["real"], p["generated"]) for p in compared} == {(50, 50)}
    assert values["reconstruction"]["images"] == 50


def test_figures_are_on_disk_before_they_are_shown(run_folder, monkeypatch):
    (run_folder / "evaluation.json").unlink(missing_ok=True)
    monkeypatch.setattr(
        cli.Evaluate,
        "_show",
        lambda self, evaluation, title: sys.exit("the reader of stdout has gone"),
    )
    with pytest.raises(SystemExit):
        poise("evaluate", run_folder, "--extractor", "none")
    assert (run_folder / "evaluation.json").exists()


def test_errors_of_the_parser_are_plain_even_on_a_terminal():
    box = "\x1b[31m╭─ \x1b[0mParsing error ─╮\n\x1b[31m│\x1b[0m \x1b[1mnot a number\x1b[0m │\n│ ──── │"
    assert cli.one_line(box) == "not a number"
    for top in ("+- Parsing error -+", " Parsing error \n ------- "):
        assert (
            cli.one_line(f"{top}\n| --epochs: not a |\n| number |\n| ---- |\n| help |")
            == "--epochs: not a number"
        )


def test_evaluation_on_a_terminal_is_a_table_with_its_protocol(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(cli.Evaluate, "_for_people", True)
    poise("evaluate", run_folder, "--extractor", "pixels", "--protocol", "dai-wipf")
    out = capsys.readouterr().out
    assert "FD-pixels" in out and "GEN-2" in out and "SSIM" in out
    assert "protocol dai-wipf" in out and "each stretched" in out and "biased upwards" in out


def test_two_folders_are_compared(run_folder, capsys, tmp_path):
    photos(tmp_path / "a", of=[(20, 30)] * 12)
    np.save(tmp_path / "b.npy", RANDOM.integers(0, 256, (15, 16, 16, 3), dtype=np.uint8))
    for limit, expected in (([], (12, 15)), (["--images", "10"], (10, 10))):
        poise(
            "evaluate",
            "--real",
            "a",
            "--generated",
            "b.npy",
            "--size",
            "16",
            "--extractor",
            "pixels",
            *limit,
        )
        values = json.loads(capsys.readouterr().out)
        protocol = next(iter(values["protocols"].values()))
        assert (protocol["real"], protocol["generated"]) == expected


def test_statistics_of_images_are_written_and_compared_with(run_folder, capsys, tmp_path):
    sets = RANDOM.integers(0, 256, (2, 15, 8, 8), dtype=np.uint8)
    for name, images in zip(("a.npy", "b.npy"), sets, strict=True):
        np.save(tmp_path / name, images)
    poise("evaluate", "--real", "a.npy", "--extractor", "pixels", "--write-statistics", "s.npz")
    assert "15 images by pixels: s.npz" in capsys.readouterr().out
    poise("evaluate", "--real", "s.npz", "--generated", "b.npy")
    values = json.loads(capsys.readouterr().out)
    assert [m["metric"] for m in values["measurements"]] == ["FD-pixels"]
    poise("evaluate", run_folder, "--real", "s.npz")
    values = json.loads(capsys.readouterr().out)
    compared = [m for m in values["measurements"] if m["metric"] == "FD-pixels"]
    assert {m["of"] for m in compared} >= {"REC", "GEN-1", "GEN-2"}
    (protocol,) = {m["protocol"] for m in compared if m["of"] == "GEN-1"}
    assert values["protocols"][protocol]["real"] == 15


def test_scores_are_written_and_the_oddest_images_named(run_folder, capsys, tmp_path):
    photos(tmp_path / "photos", of=[(20, 30)] * 3)
    few = ("--samples", "5", "--training-images", "10")
    poise("score", run_folder, "photos", "--out", "scores.csv", *few)
    out = capsys.readouterr().out
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[1].startswith("00.jpg,") and "3 images: scores.csv" in out
    assert "percentiles are of 10 training images" in out and "log p(x) -" in out
    with pytest.raises(SystemExit):
        poise("score", run_folder, "photos", "--out", "scores.txt")
    assert "give a .csv file" in capsys.readouterr().err


def test_the_doctor_compares_ten_steps_with_stored_figures(capsys, monkeypatch):
    poise("doctor", "--device", "cpu")
    assert "ok      training: cpu" in capsys.readouterr().out
    shifted = tuple((loss * 1.002, kl) for loss, kl in checkup.EXPECTED)
    monkeypatch.setattr(checkup, "EXPECTED", shifted)
    monkeypatch.setattr(checkup.metadata, "requires", lambda name: ["torch>=99", "nothing>=1"])
    monkeypatch.setattr(checkup, "check_files", lambda: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(SystemExit) as exit:
        poise("doctor", "--device", "cpu")
    shown = capsys.readouterr()
    assert exit.value.code == 1 and "not all checks passed" in shown.err
    for line in ("failed  torch: ", "failed  nothing: not installed", "failed  files: OSError"):
        assert line in shown.out
    assert "failed  training: cpu, difference from the stored figures 2.0e-03" in shown.out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "a run's folder, or two sets"),
        (["--real", "a"], "a run's folder, or two sets"),
        (["runs", "--real", "a", "--generated", "b"], "not both"),
        (["--real", "a", "--generated", "b", "--nll-samples", "5"], "have no likelihood"),
        (["runs", "--real", "a"], "beside a run, --real can only be a file of statistics"),
        (["--write-statistics", "x.npz"], "takes --real, and no --generated"),
        (["--real", "a", "--generated", "b", "--statistics-by", "ttur"], "that is a file of stat"),
        (["runs", "--size", "32"], "a run has its own"),
        (["runs", "--levels", "1"], "the images of a run are read as in its training"),
        (["--real", __file__, "--generated", __file__, "--images", "1"], "at least 2 images"),
        (["runs", "--protocol", "mine"], "no such folder"),
    ],
)
def test_what_evaluate_cannot_do_is_said(arguments, expected, capsys):
    with pytest.raises(SystemExit) as exit:
        poise("evaluate", *arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and expected in error and len(error.splitlines()) == 1


def test_diagnosis_is_in_words_or_in_json(run_folder, capsys):
    poise("diagnose", run_folder)
    words = capsys.readouterr().out
    poise("diagnose", run_folder, "--json")
    values = json.loads(capsys.readouterr().out)
    assert all(finding["sentence"] in words for finding in values["findings"])
    assert values["figures"]["mse"] > 0 and ("Healthy" in words) == values["healthy"]


@pytest.mark.parametrize("command", [["train"], ["compare"], ["reproduce", "cifar10"]])
def test_every_engine_can_be_chosen(command):
    for engine in get_args(Engine):
        assert cli.parse([*command, "--engine", engine]).options().engine == engine


def test_a_recipe_brings_its_own_data(tmp_path, monkeypatch):
    def recipe_of(*words):
        command = cli.parse(["train", *words])
        recipe = pipeline.resolve(command.data, command.recipe, None)
        return Changes(**command.changes()).apply(recipe)

    assert recipe_of("--recipe", "cifar10").data.source == "cifar10"
    assert recipe_of().data.source == "digits"
    released = recipe_of("cifar10-released", "--latent-dim", "128")
    weight = pipeline.stage_balance(released.first, released, [3, 32, 32]).kl_weight
    assert weight == (2 * 32 / 128) ** 2


def test_comparisons_can_be_left_out(run_folder, capsys):
    poise("evaluate", run_folder, "--extractor", "none")
    values = json.loads(capsys.readouterr().out)
    assert {m["metric"] for m in values["measurements"]} == {"MSE", "PSNR", "SSIM", "KL", "ELBO"}
    assert values["reconstruction"]["images"] == 180


def text_files(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    return ["train", "texts"]


def truncated(tmp_path):
    photos(tmp_path / "cut", of=[(16, 16)] * 12)
    blob = (tmp_path / "cut" / "07.jpg").read_bytes()
    (tmp_path / "cut" / "07.jpg").write_bytes(blob[: len(blob) // 2])
    return ["train", "cut", *QUICK]


def mixed(tmp_path):
    return ["train", photos(tmp_path / "mixed", of=[(16, 16)] * 11 + [(24, 16)])]


def array(values):
    def save(tmp_path):
        np.save(tmp_path / "array.npy", values)
        return ["train", "array.npy", *QUICK]

    return save


FLOATS = RANDOM.random((20, 8, 8)).astype(np.float32)
WRONG = {
    "missing folder": (lambda tmp_path: ["train", "nowhere/photos"], r"nowhere/photos"),
    "text files": (text_files, r"texts holds 1 file.*jpg"),
    "truncated jpeg": (truncated, r"07\.jpg.*--skip-unreadable"),
    "mixed sizes": (mixed, r"11\.jpg.*--size"),
    "floats outside [0, 1]": (array(255 * FLOATS), r"array\.npy.*255"),
    "nan": (array(np.where(FLOATS < 0.01, np.nan, FLOATS)), r"array\.npy.*NaN"),
    "three images": (array(FLOATS[:3]), r"3 images are too few"),
    "a size the network cannot take": (array(FLOATS[:, :7, :7]), r"not 7.*resize to 8 or 12"),
    "not a run": (lambda tmp_path: ["sample", tmp_path], r"not a run's folder"),
    "interpolation without a run": (
        lambda tmp_path: ["interpolate", tmp_path, "a.png", "b.png"],
        r"not a run's folder",
    ),
    "no such run": (lambda tmp_path: ["evaluate", "runs/lost"], r"runs/lost.*no such folder"),
    "unknown option": (
        lambda tmp_path: ["train", "--epoch", "3"],
        r"--epoch.*mean --epochs\?.*poise train --help",
    ),
    "unknown option with =": (lambda tmp_path: ["train", "--epoch=3"], r"--epoch.*mean --epochs\?"),
    "an option unlike any": (lambda tmp_path: ["train", "--wings", "3"], r"--wings, 3 \(see"),
    "unknown command": (lambda tmp_path: ["trian"], r"trian.*mean train\?.*poise --help"),
    "no number": (lambda tmp_path: ["train", "--epochs", "many"], r"--epochs.*many"),
    "unknown recipe": (lambda tmp_path: ["train", "--recipe", "imagenet"], r"imagenet.*cifar10"),
    "unknown balance": (lambda tmp_path: ["train", "--balance", "zen"], r"zen.*computed"),
    "a balance misspelt": (
        lambda tmp_path: ["compare", "--balances", "lerned"],
        r"did you mean learned\?",
    ),
    "a balance without its number": (
        lambda tmp_path: ["train", "--balance", "fixed:beta"],
        r"write fixed:beta=1",
    ),
    "a balance without its option": (
        lambda tmp_path: ["train", "--balance", "constrained"],
        r"as in constrained:target_mse=1",
    ),
    "unknown prior": (
        lambda tmp_path: ["sample", tmp_path, "--prior", "gauss"],
        r"'gauss'; there are flow, mixture, normal, second-stage, as in --prior flow \(see",
    ),
    "unknown priors": (
        lambda tmp_path: ["compare", "--priors", "gauss"],
        r"as in --priors flow",
    ),
    "no steps": (lambda tmp_path: ["train", "--epochs", "0"], r"epochs must be greater than 0"),
    "no such device": (
        lambda tmp_path: ["train", "--device", "abacus"],
        r"abacus.*give auto, cpu, cuda, cuda:1 or mps",
    ),
    "no images asked for": (
        lambda tmp_path: ["train", "--stages", "1", "--second-epochs", "3"],
        r"second stage.*one stage",
    ),
    "no data": (lambda tmp_path: ["train", "--recipe", "images"], r"no data of its own"),
    "checkpoints before the past": (
        lambda tmp_path: ["train", "--save-seconds", "-1"],
        r"save_seconds",
    ),
    "a file for a folder": (
        lambda tmp_path: ["train", "--out", __file__, *QUICK],
        r"test_cli\.py.*it is a file; give --out",
    ),
    "a folder that cannot be": (
        lambda tmp_path: ["train", "--out", "/proc/x", *QUICK],
        r"/proc/x for.*; give --out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, tmp_path, capsys, unchecked):
    make, expected = WRONG[case]
    arguments = [str(argument) for argument in make(tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    sys.argv = ["poise", *arguments]
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("poise: error: ")
    assert captured.out == ""
    assert re.search(expected, captured.err), captured.err
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] in (
        [],
        [tmp_path / "runs"],
    )


def test_without_out_the_folder_has_the_name_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    poise("train", "digits", *QUICK)
    assert (tmp_path / "runs" / "digits" / "summary.json").is_file()


def test_unreadable_images_can_be_skipped_and_are_listed(tmp_path, capsys):
    arguments = truncated(tmp_path)
    poise(*arguments, "--skip-unreadable", "--network", "mlp", "--out", "run")
    assert "07.jpg" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["train"] == 10


def test_damaged_checkpoints_are_one_line_and_exit_code_1(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "tensors.safetensors").write_bytes(b"noise")
    with pytest.raises(SystemExit) as exit:
        poise("sample", "run")
    error = capsys.readouterr().err
    assert (
        exit.value.code == 1
        and len(error.splitlines()) == 1
        and "every checkpoint is damaged" in error
    )


def test_a_full_disk_is_one_line_and_exit_code_1(run_folder, tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(SystemExit) as exit:
        poise("train", "--out", "run", *QUICK)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert exit.value.code == 1 and len(lines) == 1 and "No space left" in lines[0]


def test_the_command_alone_shows_its_help(capsys):
    with pytest.raises(SystemExit) as exit:
        poise()
    out, err = capsys.readouterr()
    assert not exit.value.code and "reconstruct" in out and err == ""


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build without CUDA")
def test_a_gpu_that_the_build_cannot_use_comes_with_a_remedy(capsys):
    with pytest.raises(SystemExit) as exit:
        poise("train", "--device", "cuda")
    error = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and "build without CUDA; use --device cpu" in error
        and "pytorch.org" in error
    )


def test_training_whose_reader_has_gone_is_finished_all_the_same(tmp_path):
    """`poise train ... 2>&1 | head -1` closes both streams after the first line."""
    command = [sys.executable, "-m", "poise", "train", "digits", "--out", "run", *QUICK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None and b"training images" in process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert load(tmp_path / "run").finished and (tmp_path / "run" / "summary.json").exists()


def test_a_single_step_and_a_single_image_are_singular(run_folder, capsys):
    poise(
        "train", "digits", "--out", "run", "--stages", "1", "--epochs", "1", "--batch-size", "1617"
    )
    assert "images, 1 step on " in capsys.readouterr().err
    poise("reconstruct", run_folder, "-n", "1")
    assert capsys.readouterr().out.startswith("1 image:")


def test_an_image_too_large_to_decode_names_the_limit_and_the_option(tmp_path, capsys, monkeypatch):
    photos(tmp_path / "photos", of=[(40, 40)] * 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SystemExit) as exit:
        poise("train", "photos", *QUICK)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "over the limit of 0.0002; pass --max-megapixels 1" in error
    assert "repair" not in error and error.rstrip().endswith("or pass --skip-unreadable")


def test_what_comes_next_can_be_pasted_into_a_shell(tmp_path, capsys):
    poise("train", "digits", "--out", "my run", *QUICK)
    assert "next: poise sample 'my run' -n 64" in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_says_so_and_is_trained_again(
    run_folder, tmp_path, capsys
):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(SystemExit) as exit:
        poise("sample", "run")
    error = capsys.readouterr().err
    assert (
        exit.value.code == 1
        and "was finished, and its checkpoints are gone: put run/checkpoints back" in error
    )
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    poise("train", "digits", "--out", "run", *QUICK)
    assert "trained again from the beginning" in capsys.readouterr().err
    assert load(tmp_path / "run").finished
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns > before


def test_sample_says_which_prior_diagnosis_found_best(run_folder, capsys, tmp_path):
    (run_folder / "diagnosis.json").unlink(missing_ok=True)
    poise("sample", run_folder, "-n", "1")
    out = capsys.readouterr().out
    assert out.startswith("1 image from prior second-stage") and "poise diagnose" in out
    poise("diagnose", run_folder, "--json")
    figures = json.loads(capsys.readouterr().out)["figures"]
    distances = {
        name: figures[f"distance_{name}"] for name in ("normal", "second-stage", "mixture")
    }
    best = min(distances, key=distances.__getitem__)
    worst = max(distances, key=distances.__getitem__)
    poise("sample", run_folder, "-n", "2", "--prior", worst)
    out = capsys.readouterr().out
    assert f"found {best} best" in out
    assert out.rstrip().endswith(f"try --prior {best}") == (
        distances[worst] - distances[best] >= 0.01
    )
    poise("sample", run_folder, "-n", "2", "--prior", best)
    out = capsys.readouterr().out
    assert f"found {best} best" in out and "try" not in out
    # A diagnosis of other weights does not count.
    shutil.copytree(run_folder, tmp_path / "copy")
    assert load(tmp_path / "copy").prior_distances() is not None
    for path in (tmp_path / "copy" / "checkpoints").iterdir():
        path.rename(path.with_name(f"{int(path.name) + 1:010d}"))
    assert load(tmp_path / "copy").prior_distances() is None


def test_help_is_complete_and_does_not_import_torch():
    code = """
import contextlib, io, sys
from poise import cli
for command in ((), *((name,) for name in cli.COMMANDS)):
    sys.argv, shown = ["poise", *command, "--help"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        cli.main()
    assert "--help" in shown.getvalue() and "torch" not in sys.modules, command
"""
    done = [
        subprocess.run([sys.executable, *how], capture_output=True, text=True, check=True)
        for how in (["-c", code], ["-m", "poise", "train", "--help"])
    ]
    assert [each.stderr for each in done] == ["", ""] and "poise train" in done[1].stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_idle_threads_sleep_unless_the_environment_says_how_they_wait(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.let_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
