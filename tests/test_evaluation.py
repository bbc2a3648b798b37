"""Test evaluation under a protocol from Python; test_cli tests the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from poise import evaluation, features
from poise.data import spread
from poise.data.decoding import jpeg_round_trip, stretch_each, to_bytes
from poise.errors import InputError, MissingExtraError
from poise.evaluation import (
    QUALIFIED,
    Produced,
    choose_extractor,
    chunks_of,
    compare,
    evaluate,
    prepare,
    remarks,
)
from poise.metrics import (
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    listed,
    manifold_figures,
)
from poise.protocols import DEFAULT, PROTOCOLS, Measurement, Protocol, with_real
from poise.runs.export import write_images

GENERATOR = np.random.default_rng(0)
REAL = GENERATOR.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
OTHER = GENERATOR.integers(30, 200, (50, 3, 8, 8), dtype=np.uint8)
PIXELS = features.make_extractor("pixels")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POISE_INCEPTION", raising=False)


def test_all_generated_images_count_beside_an_official_split(tmp_path):
    np.savez(tmp_path / "real.npz", x_train=REAL[20:], x_test=REAL[:20])
    result = evaluate(tmp_path / "real.npz", OTHER, extractor="pixels")
    protocol = result.measurements[0].protocol
    assert (protocol.reference, protocol.real, protocol.generated) == ("test", 20, 50)
    expected = frechet_distance(PIXELS(REAL[:20]), PIXELS(OTHER))
    assert result.value("FD-pixels", "generated") == pytest.approx(expected, rel=1e-9)


def test_two_arrays_are_compared_by_every_image():
    result = evaluate(REAL, OTHER, extractor="pixels")
    expected = frechet_distance(PIXELS(REAL), PIXELS(OTHER))
    assert result.value("FD-pixels", "generated") == pytest.approx(expected, rel=1e-9)
    protocol = result.measurements[0].protocol
    assert (protocol.real, protocol.generated, protocol.kid_subset_size) == (60, 50, 50)
    kid = kernel_distance(PIXELS(REAL), PIXELS(OTHER), subset_size=50)
    assert result.value("KID-pixels", "generated") == pytest.approx(kid.mean, rel=1e-9)
    assert (
        protocol.extractor == "pixels"
        and protocol.extractor_checksum == PIXELS.checksum
        and protocol.complete
    )


def test_folders_and_files_are_compared_as_arrays_are(tmp_path):
    write_images([torch.from_numpy(REAL).float() / 255], tmp_path / "real", len(REAL))
    np.savez(tmp_path / "other.npz", images=OTHER.transpose(0, 2, 3, 1))
    read = evaluate(str(tmp_path / "real"), tmp_path / "other.npz", extractor="pixels")
    given = evaluate(REAL, torch.from_numpy(OTHER), extractor="pixels")
    assert [m.value for m in read.measurements] == pytest.approx(
        [m.value for m in given.measurements], rel=1e-9
    )


def test_an_evaluation_shows_itself_as_its_table():
    evaluation = evaluate(REAL, OTHER, extractor="pixels")
    assert repr(evaluation) == str(evaluation) and "FD-pixels" in repr(evaluation)
    html = evaluation._repr_html_()
    assert html.startswith("<table>") and "<th>FD-pixels</th>" in html
    assert (
        f"<td>{evaluation.table()[1][1]}</td>" in html and f"<p>note: {evaluation.notes[0]}" in html
    )


def test_images_of_sorted_files_are_of_all_classes_but_under_the_released_protocols():
    """Former defect: the first images were taken, those of the first folder."""
    sorted_images = np.repeat(np.arange(4, dtype=np.uint8), 10).reshape(-1, 1, 1, 1)
    wanted = replace(DEFAULT, real=8)
    some = evaluation.real_images(sorted_images, wanted)
    assert np.bincount(some[:, 0, 0, 0]).tolist() == [2, 2, 2, 2]
    released = replace(PROTOCOLS["released-celeba"], real=8, name="mine")
    assert evaluation.real_images(sorted_images, released).max() == 0
    # Measurements of spaced images are told from earlier ones of the first images.
    assert with_real(wanted, 40).hash != wanted.hash == with_real(wanted, 8).hash
    assert replace(wanted, chosen="first").hash == wanted.hash


def test_so_many_images_of_each_set_are_compared():
    limited, cut = (
        evaluate(REAL, OTHER, extractor="pixels", count=20),
        evaluate(spread(REAL, 20), spread(OTHER, 20), extractor="pixels"),
    )
    assert (
        limited.distance() == cut.distance() != evaluate(REAL, OTHER, extractor="pixels").distance()
    )


def test_identical_sets_are_at_distance_zero():
    result = evaluate(REAL, REAL, extractor="pixels")
    assert result.value("FD-pixels", "generated") == pytest.approx(0, abs=1e-6)
    assert result.value("precision", "generated") == result.value("coverage", "generated") == 1


def test_every_choice_of_a_protocol_has_an_effect():
    base = Protocol("mine", reference="given", real=None)
    floats = torch.from_numpy(OTHER).float() / 300
    values = {}
    for name, change in {
        "base": {},
        "fewer real": {"real": 40},
        "fewer generated": {"generated": 40},
        "float": {"pixels": "float"},
        "stretch": {"stretch": True},
        "jpeg": {"jpeg": 75},
    }.items():
        values[name] = evaluate(
            REAL, floats, protocol=replace(base, **change), extractor="pixels"
        ).value("FD-pixels", "generated")
    assert len(set(values.values())) == len(values), values


def test_the_reference_goes_through_jpeg_and_produced_images_are_stretched():
    protocol = Protocol("mine", reference="given", real=None, stretch=True, jpeg=50)
    result = evaluate(REAL, OTHER, protocol=protocol, extractor="pixels")
    stored = jpeg_round_trip(torch.from_numpy(REAL), 50)
    stretched = to_bytes(stretch_each(torch.from_numpy(OTHER).float() / 255))
    expected = frechet_distance(PIXELS(stored), PIXELS(stretched))
    assert result.value("FD-pixels", "generated") == pytest.approx(expected, rel=1e-9)


def test_stretching_takes_each_image_to_its_own_range():
    images = torch.rand(5, 3, 4, 4) * 0.5 + 0.2
    flat = stretch_each(images).flatten(1)
    torch.testing.assert_close(flat.amin(1), torch.zeros(5))
    torch.testing.assert_close(flat.amax(1), torch.ones(5))
    assert torch.equal(stretch_each(torch.full((1, 1, 2, 2), 0.3)), torch.zeros(1, 1, 2, 2))


def test_float_pixels_are_not_rounded():
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(prepare(images, replace(PROTOCOLS["default"], pixels="float")), images)
    assert torch.equal(prepare(images, PROTOCOLS["default"]), to_bytes(images))


def test_real_features_are_extracted_once(monkeypatch):
    seen = []
    counted = replace(
        PIXELS, network=lambda levels: seen.append(len(levels)) or PIXELS.network(levels)
    )
    protocol = replace(
        PROTOCOLS["every-image"], extractor=PIXELS.name, extractor_checksum=PIXELS.checksum
    )
    produced = evaluation.Produced(
        "generated", lambda count: evaluation.chunks_of(OTHER, count), len(OTHER)
    )
    first = compare(REAL, [produced], protocol, counted)
    assert sum(seen) == len(REAL) + len(OTHER)
    again = compare(REAL, [produced], protocol, counted)
    assert sum(seen) == len(REAL) + 2 * len(OTHER) and again == first
    compare(REAL[::-1].copy(), [produced], protocol, counted)
    assert sum(seen) == 2 * len(REAL) + 3 * len(OTHER), (
        "other images, or their order, were taken for these"
    )


def test_extrapolation_is_done_where_there_are_enough_images():
    grey = GENERATOR.integers(0, 256, (300, 1, 2, 2), dtype=np.uint8)
    result = evaluate(grey, grey[:200], extractor="pixels", infinity=True)
    assert "FD-pixels infinity" in {m.metric for m in result.measurements}
    refused = evaluate(REAL, OTHER, extractor="pixels", infinity=True)
    assert any("too few images to extrapolate" in note for note in refused.notes)


def test_metrics_that_are_not_asked_for_are_not_computed(monkeypatch):
    protocol, extractor, _ = choose_extractor(
        replace(PROTOCOLS["default"], real=60, generated=50), "pixels", torch.device("cpu")
    )
    produced = Produced("others", lambda count: chunks_of(OTHER, count), 50)
    whole = compare(REAL, [produced], protocol, extractor)
    monkeypatch.setattr(listed, "manifold_figures", lambda *given, **named: pytest.fail("computed"))
    some = compare(REAL, [produced], protocol, extractor, metrics=("FD-", "KID-"))
    assert [m.metric for m in some] == ["FD-pixels", "KID-pixels"]
    assert some == [m for m in whole if m.metric in ("FD-pixels", "KID-pixels")]


def test_few_images_are_remarked_upon():
    biased, unsure = evaluate(REAL, OTHER, extractor="pixels").notes
    assert "biased upwards" in biased and "from 2,000 images" in unsure
    assert remarks([], infinity=True) == ()


@pytest.mark.parametrize(("name", "enough"), QUALIFIED.items())
def test_a_distance_is_remarked_upon_below_the_size_at_which_it_qualifies(name, enough):
    def notes(generated: int) -> tuple[str, ...]:
        conditions = replace(complete_protocol, extractor=name, real=10_000, generated=generated)
        return remarks([Measurement("FD", "REC", 1.0, conditions)], infinity=False)

    complete_protocol = evaluate(REAL, OTHER, extractor="pixels").measurements[0].protocol
    assert not any("damaged" in note for note in notes(enough))
    (note,) = (note for note in notes(enough - 1) if "damaged" in note)
    assert f"FD-{name} of {enough - 1}" in note


def test_without_inception_the_light_network_is_used_under_its_own_name(monkeypatch):
    monkeypatch.setattr(evaluation, "available_inception", lambda: None)
    monkeypatch.setattr(
        evaluation, "make_extractor", lambda spec, device="cpu": replace(PIXELS, name=spec)
    )
    protocol, network, notes = choose_extractor(PROTOCOLS["default"], "auto", torch.device("cpu"))
    assert network is not None and network.distance == "FD-light" and "not FID" in notes[0]
    assert protocol.extractor == "light" and protocol.hash != PROTOCOLS["default"].hash


def test_with_no_network_at_all_nothing_is_compared(monkeypatch):
    def missing(spec, device="cpu"):
        raise MissingExtraError("light comparisons", "light")

    monkeypatch.setattr(evaluation, "available_inception", lambda: None)
    monkeypatch.setattr(evaluation, "make_extractor", missing)
    protocol, network, notes = choose_extractor(PROTOCOLS["default"], "auto", torch.device("cpu"))
    assert (
        network is None
        and protocol.extractor == "none"
        and 'pip install "poise[light]"' in notes[0]
    )
    with pytest.raises(InputError, match="Inception is not at hand"):
        evaluate(REAL, OTHER)


def test_numbers_are_asked_for_by_name():
    result = evaluate(REAL, OTHER, extractor="pixels")
    assert result.distance() == result.value("FD-pixels") == result.value("FD-pixels", "generated")
    with pytest.raises(
        InputError, match="FID of any set is not measured; there are FD-pixels, KID-pixels"
    ):
        result.value("FID")
    assert str(result).splitlines()[0].split()[:2] == [
        "FD-pixels",
        "KID-pixels",
    ] and "note: " in str(result)


def test_every_distance_is_of_the_right_set_with_the_right_settings():
    """Sizes and neighbour counts all differ, so that a mix-up changes the result."""
    classifier = torch.randn(7, PIXELS(REAL).shape[1], generator=torch.Generator().manual_seed(1))
    extractor = replace(PIXELS, classifier=classifier)
    settings = {
        "kid_subset_size": 20,
        "kid_subsets": 7,
        "draws_seed": 5,
        "precision_neighbours": 2,
        "coverage_neighbours": 4,
    }
    protocol = Protocol("mine", reference="given", real=None, score_splits=3, **settings)
    produced = evaluation.Produced(
        "x", lambda count: evaluation.chunks_of(OTHER, count), len(OTHER), seed=9
    )
    known = {"extractor": extractor.name, "extractor_checksum": extractor.checksum}
    measured = {
        m.metric: m
        for m in compare(REAL, [produced], replace(protocol, **known), extractor, infinity=True)
    }
    real, other = PIXELS(REAL), PIXELS(OTHER)
    kid = kernel_distance(real, other, subsets=7, subset_size=20, seed=5)
    assert (measured["KID-pixels"].value, measured["KID-pixels"].spread) == pytest.approx(
        (kid.mean, kid.std), rel=1e-9
    )
    expected = manifold_figures(real, other, neighbours=2, density_neighbours=4)
    names = ("precision", "recall", "density", "coverage")
    assert [measured[name].value for name in names] == [getattr(expected, name) for name in names]
    assert len({measured[name].value for name in names}) > 1, "the sets are too alike to tell"
    score = inception_score(other @ classifier.T, splits=3, seed=5)
    assert (measured["IS-pixels"].value, measured["IS-pixels"].spread) == pytest.approx(
        (score.mean, score.std), rel=1e-6
    )
    assert {m.seed for m in measured.values()} == {9} and {
        m.protocol.side for m in measured.values()
    } == {8}


def test_an_extrapolation_has_its_standard_error():
    grey = GENERATOR.integers(0, 256, (300, 1, 2, 2), dtype=np.uint8)
    other = GENERATOR.integers(40, 256, (200, 1, 2, 2), dtype=np.uint8)
    found = next(
        m
        for m in evaluate(grey, other, extractor="pixels", infinity=True).measurements
        if "infinity" in m.metric
    )
    expected = frechet_infinity(PIXELS(grey), PIXELS(other), smallest=100)
    assert (found.value, found.spread) == pytest.approx(
        (expected.value, expected.standard_error), rel=1e-6
    )


def test_a_spread_over_equal_subsets_is_none():
    measured = evaluate(REAL[:50], OTHER, extractor="pixels").measurements
    assert next(m for m in measured if m.metric == "KID-pixels").spread is None


def test_two_settings_that_give_different_numbers_have_different_hashes(tmp_path):
    big = np.random.default_rng(3).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
    sizes = [
        evaluate(big, big[::-1].copy() // 2, extractor="pixels", size=size).measurements[0]
        for size in (16, 8)
    ]
    assert sizes[0].value != sizes[1].value and sizes[0].protocol.hash != sizes[1].protocol.hash


def test_the_real_images_are_on_record():
    first, second = (
        evaluate(real, OTHER, extractor="pixels").measurements[0] for real in (REAL, REAL // 2)
    )
    assert first.protocol.hash == second.protocol.hash and first.data != second.data


def test_a_named_data_set_is_compared_by_the_side_that_the_protocol_names(tmp_path):
    np.savez(
        tmp_path / "split.npz",
        x_train=REAL.transpose(0, 2, 3, 1),
        x_test=OTHER.transpose(0, 2, 3, 1),
    )
    for name, side, count in (("50k-train", "train", 60), ("default", "test", 50)):
        protocol = (
            evaluate(tmp_path / "split.npz", OTHER, protocol=name, extractor="pixels")
            .measurements[0]
            .protocol
        )
        assert (protocol.reference, protocol.real) == (side, count)
    folder = evaluate(REAL, OTHER, protocol="released", extractor="pixels").measurements[0].protocol
    assert folder.reference == "given" and folder.generation is None


def test_strange_pairs_are_remarked_upon():
    assert "the two sets are the same images" in evaluate(REAL, REAL, extractor="pixels").notes
    assert any("grey" in note for note in evaluate(REAL, OTHER[:, :1], extractor="pixels").notes)


def test_json_is_strict_and_holds_each_protocol_once():
    result = evaluate(REAL, OTHER, extractor="pixels")
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {m["protocol"] for m in values["measurements"]} == set(values["protocols"])
    protocol = next(iter(values["protocols"].values()))
    assert protocol["real"] == 60 and protocol["extractor_checksum"] == PIXELS.checksum


def test_a_folder_with_a_config_of_another_program_is_a_folder_of_images(tmp_path):
    for number in range(4):
        Image.fromarray(OTHER[number].transpose(1, 2, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "checkpoints").mkdir()
    assert evaluate(REAL, tmp_path, extractor="pixels").distance() > 0


def test_wrong_sets_are_refused(unchecked, tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": {}, "data": {}}')
    (tmp_path / "checkpoints").mkdir()
    for others, message in {
        "no-such-folder": "no-such-folder",
        str(tmp_path): "is a run: poise evaluate",
        3: "not int",
    }.items():
        with pytest.raises(InputError, match=message):
            evaluate(REAL, others, extractor="pixels")
    with pytest.raises(InputError, match="60 and 1 images cannot be compared"):
        evaluate(REAL, OTHER[:1], extractor="pixels")
    with pytest.raises(InputError, match=r"8x8 and 4x4 pixels.*--size"):
        evaluate(REAL, OTHER[:, :, ::2, ::2], extractor="pixels")
    with pytest.raises(InputError, match="only be compared by an extractor"):
        evaluate(REAL, OTHER, extractor="none")
    with pytest.raises(InputError, match="no protocol"):
        evaluate(REAL, OTHER, protocol="mine", extractor="pixels")
