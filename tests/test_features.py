"""Test extractors around networks without weights: inputs, outputs, names and resizing."""

import math

import numpy as np
import pytest
import torch

from poise.data import Rows
from poise.errors import InputError, RunError
from poise.features import Extractor, extract, extractor, make_extractor
from poise.features.resize import resize_like_tensorflow1

BYTES = np.random.default_rng(0).integers(0, 256, (123, 1, 4, 4), dtype=np.uint8)


def levels(images: torch.Tensor) -> torch.Tensor:
    assert images.dtype == torch.float32 and images.shape[1] == 3
    return images.flatten(1)


def extractor_of(network, name: str = "net") -> Extractor:
    return Extractor(name, "0" * 64, "none", network, torch.device("cpu"))


LEVELS = extractor_of(levels)
EXPECTED = torch.from_numpy(BYTES).expand(-1, 3, -1, -1).flatten(1).float()


def test_every_image_is_seen_once_and_in_order():
    rows = Rows(np.concatenate([BYTES, BYTES]), np.arange(123))
    for images in (BYTES, torch.from_numpy(BYTES), rows):
        assert torch.equal(extract(LEVELS, images), EXPECTED)
    assert torch.equal(LEVELS(BYTES), EXPECTED)


@pytest.mark.parametrize("total", [None, 123])
def test_batches_of_any_size_can_come_from_a_generator(total):
    batches = (BYTES[start : start + 17] for start in range(0, 123, 17))
    assert torch.equal(extract(LEVELS, batches, total=total), EXPECTED)


@pytest.mark.parametrize("total", [122, 124])
def test_a_generator_of_another_number_of_images_is_an_error(total):
    with pytest.raises(InputError, match=f"123 images, not {total}"):
        extract(LEVELS, iter([BYTES]), total=total)


def test_a_generator_of_nothing_is_an_error():
    with pytest.raises(InputError, match="0 images"):
        extract(LEVELS, iter([]))


def test_progress_goes_to_stderr_and_only_if_asked_for(capsys):
    extract(LEVELS, BYTES)
    assert capsys.readouterr().err == ""
    extract(LEVELS, BYTES, title="real", quiet=False)
    out, err = capsys.readouterr()
    assert out == "" and "real 123/123" in err


def test_floats_are_levels_that_are_not_rounded():
    images = torch.rand(5, 3, 4, 4)
    assert torch.equal(LEVELS(images), (images * 255).flatten(1))
    torch.testing.assert_close(LEVELS(BYTES / np.float32(255)), EXPECTED, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 2, 4, 4), r"1 or 3"),
        (torch.zeros(3, 4, 4), r"1 or 3"),
        (torch.zeros(0, 3, 4, 4), "no images"),
        (torch.full((1, 1, 2, 2), 1.5), r"\[0, 1\], not floats from 1.5 to 1.5"),
        (torch.full((1, 1, 2, 2), -0.5), r"\[0, 1\]"),
        (torch.full((1, 1, 2, 2), math.nan), r"\[0, 1\]"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), "int64"),
    ],
)
def test_what_are_no_images_is_an_error(images, message):
    with pytest.raises(InputError, match=message):
        LEVELS(images)


def test_what_are_no_features_is_an_error():
    with pytest.raises(InputError, match=r"gives \(5, 3, 4, 4\) for 5 images"):
        extractor_of(lambda images: images)(BYTES)
    with pytest.raises(RunError, match="not finite"):
        extractor_of(lambda images: images.flatten(1).log())(np.zeros((1, 1, 2, 2), np.uint8))


def test_only_inception_may_call_its_distance_fid():
    inception, mine = extractor_of(levels, "inception"), extractor_of(levels, "mynet")
    assert [inception.distance, inception.metric_name("KID"), inception.metric_name("IS")] == [
        "FID",
        "KID",
        "IS",
    ]
    assert [mine.distance, mine.metric_name("KID"), mine.metric_name("IS")] == [
        "FD-mynet",
        "KID-mynet",
        "IS-mynet",
    ]


def test_pixels_are_averages_over_cells():
    extractor = make_extractor("pixels")
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 48), dtype=np.uint8)
    expected = images.reshape(3, 3, 16, 2, 16, 3).mean((3, 5)).reshape(3, -1) / 255
    torch.testing.assert_close(extractor(images), torch.from_numpy(expected).float())
    torch.testing.assert_close(extractor(BYTES), EXPECTED / 255)
    assert extractor.distance == "FD-pixels" and len(extractor.checksum) == 64


def test_an_unknown_extractor_is_named_with_those_there_are():
    with pytest.raises(
        InputError,
        match=r"no extractor 'incept': give inception, light, dinov2, pixels, or a TorchScript",
    ):
        make_extractor("incept")


SIZES = [
    ((32, 32), (299, 299)),
    ((7, 13), (20, 9)),
    ((64, 48), (31, 50)),
    ((90, 61), (29, 31)),
    ((1, 1), (3, 2)),
    ((9, 9), (9, 9)),
]


@pytest.mark.parametrize(("given", "wanted"), SIZES)
def test_the_resize_is_torch_fidelitys_bit_by_bit(torch_fidelity, given, wanted):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    images = torch.rand(2, 3, *given) * 255
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, size=wanted, align_corners=False)
    assert torch.equal(resize_like_tensorflow1(images, *wanted), expected)


@pytest.mark.parametrize(("given", "wanted"), [((7, 13), (20, 9)), ((5, 4), (3, 11))])
def test_the_resize_is_bilinear_without_half_pixel_centres(given, wanted):
    image = np.random.default_rng(2).random(given)
    expected = np.empty(wanted)
    for i in range(wanted[0]):
        for j in range(wanted[1]):
            y, x = i * given[0] / wanted[0], j * given[1] / wanted[1]
            top, left = int(y), int(x)
            bottom, right = min(top + 1, given[0] - 1), min(left + 1, given[1] - 1)
            above = image[top, left] * (1 - x % 1) + image[top, right] * (x % 1)
            below = image[bottom, left] * (1 - x % 1) + image[bottom, right] * (x % 1)
            expected[i, j] = above * (1 - y % 1) + below * (y % 1)
    resized = resize_like_tensorflow1(torch.from_numpy(image).float()[None, None], *wanted)
    np.testing.assert_allclose(resized[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_parts_are_joined_to_a_gpus_batches_in_order():
    parts = [torch.arange(n) + 10 * n for n in (3, 4, 1, 5, 2)]
    joined = list(extractor._regrouped(parts, 5))
    assert [len(batch) for batch in joined] == [7, 6, 2] and torch.equal(
        torch.cat(joined), torch.cat(parts)
    )


def test_batches_made_in_the_background_come_in_order_and_so_does_an_error():
    made = []

    def batches():
        for number in range(5):
            made.append(number)
            yield torch.tensor(number)
        raise RuntimeError("the sixth")

    seen = []
    with pytest.raises(RuntimeError, match="the sixth"):
        for batch in extractor._in_background(batches(), torch.device("cpu")):
            seen.append(int(batch))
    assert seen == made == [0, 1, 2, 3, 4]
    few = extractor._in_background(iter([torch.ones(1)] * 9), torch.device("cpu"))
    assert len(next(few)) == 1 and few.close() is None, "what is not asked for is not waited for"
