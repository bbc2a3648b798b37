"""Test protocols, and that no figure can be measured without one."""

from dataclasses import asdict, fields, replace

import pytest

from poise.errors import InputError
from poise.protocols import (
    PROTOCOLS,
    Measurement,
    Protocol,
    find_protocol,
    model_protocol,
    protocols_json,
    show,
    table,
)
from poise.recipes.settings import Generation

COMPLETE = Protocol(
    "mine", real=100, generated=100, extractor="pixels", extractor_checksum="ab" * 32, resize="none"
)
OTHER = {
    "chosen": "spaced",
    "reference": "train",
    "real": 99,
    "generated": 7,
    "pixels": "float",
    "stretch": True,
    "jpeg": 75,
    "side": 32,
    "generation": Generation(renormalise="always"),
    "extractor": "light",
    "extractor_checksum": "cd" * 32,
    "resize": "bilinear",
    "kid_subsets": 10,
    "kid_subset_size": 50,
    "draws_seed": 1,
    "precision_neighbours": 4,
    "coverage_neighbours": 4,
    "score_splits": 5,
    "statistics": "torch-fidelity",
}


def measurement(
    metric: str = "FID", of: str = "REC", protocol: Protocol = COMPLETE, value: float = 1.5
) -> Measurement:
    return Measurement(metric, of, value, protocol)


def test_every_attribute_but_the_name_changes_the_hash():
    assert set(OTHER) == {field.name for field in fields(Protocol)} - {"name"}
    hashes = {replace(COMPLETE, **{name: value}).hash for name, value in OTHER.items()}
    assert len(hashes | {COMPLETE.hash}) == len(OTHER) + 1
    assert replace(COMPLETE, name="another").hash == COMPLETE.hash
    plain, noisy = (
        replace(COMPLETE, generation=Generation()),
        replace(COMPLETE, generation=Generation(second_stage_noise=False)),
    )
    assert len({COMPLETE.hash, plain.hash, noisy.hash}) == 3


def test_the_hashes_of_named_protocols_are_those_of_every_earlier_version():
    """Do not change a hash: published numbers would seem measured differently.

    Add a protocol instead.
    """
    assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == {
        "default": "44136fa355",
        "released": "100c432789",
        "released-celeba": "0d7fa19821",
        "dai-wipf": "15fef6e1d4",
        "50k-train": "38cae5fb67",
        "every-image": "273bd9df17",
    }


def test_named_protocols_differ_where_the_literature_does():
    default, released = PROTOCOLS["default"], PROTOCOLS["released"]
    assert (default.reference, default.real, default.pixels, default.stretch) == (
        "test",
        10_000,
        "8-bit",
        False,
    )
    assert (released.real, released.pixels, released.jpeg) == (9_984, "float", 75)
    assert released.generation is not None and released.generation.reconstruct_from == "sample"
    assert PROTOCOLS["dai-wipf"] == replace(default, name="dai-wipf", stretch=True)
    assert (PROTOCOLS["50k-train"].reference, PROTOCOLS["50k-train"].real) == ("train", 50_000)
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())


@pytest.mark.parametrize(
    "missing", [{"real": None}, {"generated": None}, {"extractor_checksum": ""}]
)
def test_a_measurement_needs_a_complete_protocol(missing):
    with pytest.raises(InputError, match="FID of REC needs a complete protocol"):
        measurement(protocol=replace(COMPLETE, **missing))


def test_a_measurement_needs_a_protocol(unchecked):
    with pytest.raises(TypeError):
        Measurement("FID", "REC", 1.5)
    with pytest.raises(InputError, match="needs a complete protocol"):
        Measurement("FID", "REC", 1.5, "default")


def test_figures_of_the_model_need_no_extractor():
    assert (
        measurement(
            "MSE", protocol=model_protocol(replace(PROTOCOLS["default"], real=180))
        ).protocol.real
        == 180
    )


def test_json_names_the_protocol_by_its_hash():
    one = measurement(value=float("nan"))
    assert one.to_json()["protocol"] == COMPLETE.hash and one.to_json()["value"] is None
    assert protocols_json([one, measurement("KID")]) == {COMPLETE.hash: asdict(COMPLETE)}


def test_a_table_has_a_row_for_each_thing_and_a_column_for_each_metric():
    rows = table([measurement(), measurement("KID"), measurement(of="GEN-1", value=123.456)])
    assert rows == [["", "FID", "KID"], ["REC", "1.5000", "1.5000"], ["GEN-1", "123.46", ""]]


def test_a_table_does_not_mix_protocols_silently():
    stretched = replace(COMPLETE, stretch=True)
    mixed = [measurement(), measurement(protocol=stretched)]
    with pytest.raises(InputError, match="FID measured under several protocols"):
        table(mixed)
    rows = table(mixed, mixed=True)
    assert rows[0][1] == "protocol, images" and [row[1] for row in rows[1:]] == [
        COMPLETE.hash,
        stretched.hash,
    ]


def test_a_table_does_not_mix_real_images_silently():
    mixed = [replace(measurement(), data="one"), replace(measurement(), data="another")]
    with pytest.raises(InputError, match="against other real images"):
        table(mixed)
    assert [row[1] for row in table(mixed, mixed=True)[1:]] == [
        f"{COMPLETE.hash} one",
        f"{COMPLETE.hash} another",
    ]


def test_small_numbers_keep_their_digits():
    assert show(replace(measurement(value=-0.0000123), spread=0.00002)) == "-1.23e-05 ± 2e-05"


def test_a_table_does_not_drop_a_number():
    with pytest.raises(InputError, match="given twice"):
        table([measurement(), measurement(value=2.0)])


def test_a_name_that_is_none_is_answered_with_those_that_are():
    with pytest.raises(
        InputError, match=r"no protocol 'relesed': there are default, .*did you mean released\?"
    ):
        find_protocol("relesed")
    assert find_protocol(COMPLETE) is COMPLETE


def test_impossible_protocols_are_refused(unchecked):
    for wrong in (
        {"real": 0},
        {"jpeg": 0},
        {"jpeg": 200},
        {"kid_subsets": 0},
        {"kid_subset_size": 1},
        {"coverage_neighbours": 0},
    ):
        with pytest.raises(InputError, match=f"a protocol's {next(iter(wrong))} must be"):
            Protocol("mine", **wrong)
    with pytest.raises(InputError, match="pixels must be one of 8-bit, float"):
        Protocol("mine", pixels="16-bit")
