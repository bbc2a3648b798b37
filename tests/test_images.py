"""Test that pixels survive reading and writing, upright, complete and in the right range."""

import io
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from poise.data import decoding as images
from poise.errors import InputError, MissingInputError, RunError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def every_byte() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_bytes_survive_the_way_to_floats_and_back():
    floats = images.to_float(every_byte())
    assert floats.dtype == torch.float32 and floats.min() == 0 and floats.max() == 1
    assert torch.equal(images.to_bytes(floats), every_byte())
    assert torch.equal(images.to_bytes(floats.double()), every_byte())
    assert every_byte().max() == 255  # the argument is unchanged


@settings(deadline=None)
@given(st.floats(0, 1, width=32))
def test_a_float_becomes_the_nearest_byte(value):
    byte = images.to_bytes(torch.full((1, 1, 1, 1), value)).item()
    assert abs(byte - 255 * value) <= 0.5001


def test_floats_outside_the_range_are_clipped_and_halves_round_upwards():
    values = torch.tensor([-3.0, 0.5 / 255, 1.5 / 255, 7.0, torch.inf]).reshape(1, 1, 1, 5)
    assert images.to_bytes(values).flatten().tolist() == [0, 1, 2, 255, 255]


def test_nan_never_becomes_a_byte():
    with pytest.raises(InputError, match="NaN"):
        images.to_bytes(torch.full((1, 1, 2, 2), torch.nan))


def test_a_grid_shows_every_image_enlarged_and_separated():
    digits = torch.rand(5, 1, 8, 8)
    picture = images.grid(digits, columns=2)
    assert picture.dtype == np.uint8 and picture.shape == (3 * 64 + 2 * 2, 2 * 64 + 2, 1)
    assert (picture[64:66] == 255).all() and (picture[:, 64:66] == 255).all()
    fourth = torch.from_numpy(picture[66 : 66 + 64 : 8, 66 : 66 + 64 : 8, 0])
    assert torch.equal(fourth, images.to_bytes(digits)[3, 0])
    assert (picture[132:, 66:] == 255).all()  # the empty sixth place


def test_a_grid_is_about_square_and_leaves_large_images_as_they_are():
    assert images.grid(torch.zeros(9, 3, 70, 90, dtype=torch.uint8)).shape == (
        3 * 72 - 2,
        3 * 92 - 2,
        3,
    )


def test_an_animation_shows_each_image_there_and_back():
    several = torch.rand(4, 1, 8, 8)
    with Image.open(io.BytesIO(images.to_gif(several))) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (6, 0, 100)
        for number, shown in enumerate([0, 1, 2, 3, 2, 1]):
            gif.seek(number)
            expected = images.grid(several[shown][None])[:, :, 0]
            assert np.array_equal(np.asarray(gif.convert("L")), expected)


def test_an_empty_grid_is_refused():
    with pytest.raises(InputError, match="at least one image"):
        images.grid(torch.zeros(0, 1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_and_nothing_else_is_left_beside_it(tmp_path, channels):
    pixels = NOISE[:, :, :channels]
    images.save_png(tmp_path / "new" / "picture.png", pixels)
    stored = np.asarray(Image.open(tmp_path / "new" / "picture.png")).reshape(pixels.shape)
    assert np.array_equal(stored, pixels)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_a_picture_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*taken"):
        images.save_png(tmp_path / "taken", NOISE)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_sixteen_bit_greys_are_scaled_not_clipped():
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    picture = images.read_image(encoded(Image.fromarray(levels), "PNG"), "L")
    assert np.array_equal(np.asarray(picture).ravel(), np.arange(256))
    assert images.read_image(encoded(Image.fromarray(levels), "TIFF"), "RGB").getpixel(
        (15, 15)
    ) == (255, 255, 255)
    assert images.read_header(encoded(Image.fromarray(levels), "PNG"), "x") == (16, 16, True)


def test_a_transparent_level_of_sixteen_bits_becomes_white():
    levels = (np.arange(256, dtype=np.uint16) * 16).reshape(16, 16)
    file = encoded(Image.fromarray(levels), "PNG", transparency=160)
    picture = np.asarray(images.read_image(file, "L", levels=4080)).ravel()
    assert picture[10] == 255 and np.array_equal(np.delete(picture, 10), np.delete(range(256), 10))


def test_signed_sixteen_bits_are_sixteen_bits():
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 1000
    signed = {339: (2,)}  # SampleFormat
    file = encoded(Image.fromarray(values), "TIFF", tiffinfo=signed)
    expected = np.floor(values * (255 / 15000) + 0.5)
    assert np.array_equal(images.read_image(file, "L", levels=15000), expected)
    file = encoded(Image.fromarray(values - 1), "TIFF", tiffinfo=signed)
    with pytest.raises(InputError, match="signed 16-bit pixels with values below 0"):
        images.read_image(file, "L", "scan.tif")


@pytest.mark.parametrize("levels", [1, 200, 4095, 65535])
def test_levels_are_rounded_to_the_nearest_byte(levels):
    values = np.arange(65536, dtype=np.uint16)
    exact = 255 * values.clip(0, levels).astype(np.float64) / levels
    assert np.abs(images.to_levels(values, levels) - exact).max() <= 0.5
    assert np.array_equal(
        images.to_levels(values, levels), images.to_levels(values.astype(np.float32), levels)
    )


def test_levels_of_masks_make_one_white_and_leave_transparency():
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    assert np.array_equal(
        images.read_image(encoded(Image.fromarray(mask), "PNG"), "L", levels=1), mask * 255
    )
    clear = np.dstack([mask, mask, mask, np.array([[255, 255], [0, 0]], np.uint8)])
    picture = images.read_image(encoded(Image.fromarray(clear), "PNG"), "L", levels=1)
    assert np.array_equal(picture, [[0, 255], [255, 255]])
    white = encoded(Image.fromarray(mask * 255), "PNG")  # 4095 is not for bytes
    assert np.array_equal(images.read_image(white, "L", levels=4095), mask * 255)


def test_a_picture_with_damaged_exif_data_is_upright():
    lying = Image.fromarray(NOISE)
    damaged = b"Exif\0\0\xff\xff\xff\xff\0\0\0\x08"
    with Image.open(encoded(lying, "JPEG", exif=damaged)) as picture:
        square = images.square_resize(images.upright(picture), 20)
    with Image.open(encoded(lying, "JPEG")) as picture:
        assert np.array_equal(square, images.square_resize(images.upright(picture), 20))


def test_a_file_above_the_limit_names_the_limit_and_the_option(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    file = encoded(Image.new("L", (1500, 1000)), "PNG")
    with pytest.raises(
        InputError, match=r"decoded: it has 2 megapixels, over the limit of 1; pass --max"
    ):
        images.read_image(file, "L", "x.png")


def test_heic_is_read_by_the_extra_and_named_without_it(monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    halves = np.full((40, 60, 3), 30, np.uint8)
    halves[:, 30:] = 220
    heif.from_bytes("RGB", (60, 40), halves.tobytes()).save(file)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.init()  # registers the other plugins before the lists are replaced
    for kinds in (Image.OPEN, Image.EXTENSION):
        monkeypatch.delitem(kinds, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    with pytest.raises(
        InputError, match=r"IMG.HEIC cannot be decoded: HEIC needs.*pip install .poise\[heic\]"
    ):
        images.read_image(file, "RGB", "IMG.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    picture = np.asarray(images.read_image(file, "RGB", "IMG.HEIC")).astype(int)
    assert picture.shape == halves.shape and np.abs(picture - halves).mean() < 3


def test_avif_is_named_if_pillow_cannot_read_it(monkeypatch):
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    file = encoded(Image.fromarray(NOISE), "AVIF")
    assert images.read_image(file, "RGB").size == (60, 40)
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "AVIF"])
    with pytest.raises(InputError, match=r"x.avif cannot be decoded: AVIF needs Pillow 11.3"):
        images.read_image(file, "RGB", "x.avif")


def test_pixels_of_32_bits_are_refused_without_levels():
    wide = encoded(Image.fromarray(np.array([[0, 1000]], np.int32)), "TIFF")
    assert np.asarray(images.read_image(wide, "L", levels=1000)).tolist() == [[0, 255]]
    for values in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        with pytest.raises(InputError, match=r"^scan.tif cannot be decoded: 32-bit pixels"):
            images.read_image(encoded(Image.fromarray(values), "TIFF"), "L", "scan.tif")


def test_transparent_pixels_are_laid_on_white():
    red = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))
    for file in (
        encoded(red, "PNG"),
        encoded(red.convert("P"), "PNG", transparency=red.convert("P").getpixel((0, 0))),
    ):
        picture = images.read_image(file, "RGB")
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((1, 0))[0] > 200 and picture.getpixel((1, 0))[1] < 60
    assert (
        images.read_image(encoded(Image.new("LA", (1, 1), (7, 0)), "PNG"), "L").getpixel((0, 0))
        == 255
    )


def test_palettes_become_colours_and_a_palette_of_greys_counts_as_grey():
    colour = Image.fromarray(NOISE).quantize(16)
    assert np.array_equal(
        np.asarray(images.read_image(encoded(colour, "PNG"), "RGB")),
        np.asarray(colour.convert("RGB")),
    )
    assert not images.read_header(encoded(colour, "PNG"), "x").grey
    grey = Image.fromarray(NOISE[:, :, 0]).quantize(16)
    assert images.read_header(encoded(grey, "PNG"), "x").grey


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_upright_once(kind):
    lying = Image.new("RGB", (40, 20), "white")
    lying.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    file = encoded(lying, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = images.read_image(file, "L")
    assert (
        upright.size == (20, 40)
        and upright.getpixel((10, 5)) < 10
        and upright.getpixel((10, 35)) > 245
    )
    # This applies EXIF too; the rotation must not happen twice.
    square = images.square_resize(images.upright(upright), 20)
    assert square.getpixel((10, 2)) < 10 and square.getpixel((10, 17)) > 245
    with Image.open(file) as raw:
        assert np.array_equal(
            np.asarray(images.square_resize(images.upright(raw), 20).convert("L")),
            np.asarray(square),
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_that_was_cut_off_is_not_an_image(kind):
    whole = encoded(Image.fromarray(NOISE), kind).getvalue()
    with pytest.raises(InputError, match=r"^photo cannot be decoded: \w") as caught:
        images.read_image(io.BytesIO(whole[: len(whole) * 2 // 3]), "RGB", "photo")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_text_file_are_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"gone\.png does not exist"):
        images.read_image(tmp_path / "gone.png", "L")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(
        InputError, match=r"text\.png cannot be decoded: not an image of a known format$"
    ):
        images.read_image(tmp_path / "text.png", "L")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP"]), st.data())
def test_damage_anywhere_gives_a_picture_or_one_clear_error(kind, data):
    content = bytearray(encoded(Image.fromarray(NOISE), kind).getvalue())
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert images.read_image(io.BytesIO(content), "RGB", "photo").mode == "RGB"
        except InputError as error:
            assert str(error).startswith("photo cannot be decoded: ")


@pytest.mark.parametrize(
    ("shape", "rows", "cols"), [((20, 31), (0, 20), (5, 25)), ((33, 20), (6, 26), (0, 20))]
)
def test_the_centre_square_is_cut_before_resizing(shape, rows, cols):
    pixels = NOISE[: shape[0], : shape[1]]
    square = images.square_resize(Image.fromarray(pixels), 20)
    assert np.array_equal(np.asarray(square), pixels[slice(*rows), slice(*cols)])


def test_reduction_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (218, 89)))
    for small in (
        images.square_resize(images.upright(stripes), 8),
        images.crop_and_resize(stripes, size=8),
    ):
        assert np.abs(np.asarray(small).astype(int) - 127)[:, 1:-1].max() <= 8


def test_celeba_is_cut_to_rows_45_to_172_and_columns_25_to_152():
    pixels = np.random.default_rng(1).integers(0, 256, (218, 178, 3), np.uint8)
    face = images.crop_and_resize(Image.fromarray(pixels), size=128)
    assert np.array_equal(np.asarray(face), pixels[45:173, 25:153])
    assert images.crop_and_resize(Image.fromarray(pixels)).size == (64, 64)
    with pytest.raises(InputError, match="64x64 pixels has no rows 45:173"):
        images.crop_and_resize(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_round_trip_is_pillows(channels):
    batch = torch.from_numpy(NOISE[:32, :32, :channels].copy()).permute(2, 0, 1)[None]
    stored = Image.open(encoded(Image.fromarray(NOISE[:32, :32, :channels].squeeze()), "JPEG"))
    expected = torch.from_numpy(np.array(stored).reshape(32, 32, channels)).permute(2, 0, 1)[None]
    assert torch.equal(images.jpeg_round_trip(batch, 75), expected)  # 75 is Pillow's default
    assert not torch.equal(images.jpeg_round_trip(batch, 20), expected)
    assert len(images.jpeg_round_trip(batch[:0])) == 0
