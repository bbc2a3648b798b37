"""Feature extraction around an extractor that needs no weights, and what is said where Inception is not to be had."""

import sys
import types
import warnings

import numpy as np
import pytest
import torch

from poise import features
from poise.errors import InputError, MissingExtraError, MissingInputError

BYTES = np.random.default_rng(0).integers(0, 256, (123, 1, 4, 4), dtype=np.uint8)


def pixels(images: torch.Tensor) -> torch.Tensor:
    assert images.dtype == torch.uint8 and images.shape[1] == 3
    return images.flatten(1).double()


def test_every_image_is_seen_once_and_in_order():
    expected = torch.from_numpy(BYTES).expand(-1, 3, -1, -1).flatten(1).float()
    assert torch.equal(features.extract(pixels, BYTES, quiet=True), expected)
    assert torch.equal(features.extract(pixels, torch.from_numpy(BYTES), quiet=True), expected)


@pytest.fixture
def fidelity(monkeypatch):
    """Stands for torch-fidelity: its two modules, with a network of no weights."""

    class Network(torch.nn.Module):
        def __init__(self, name, features_list, weights):
            super().__init__()
            torch.load(weights)

    def resize(images, size, align_corners):
        return torch.nn.functional.interpolate(images, size, mode="nearest")

    modules = {
        "torch_fidelity": types.ModuleType("torch_fidelity"),
        "torch_fidelity.feature_extractor_inceptionv3": types.SimpleNamespace(FeatureExtractorInceptionV3=Network),
        "torch_fidelity.interpolate_compat_tensorflow": types.SimpleNamespace(interpolate_bilinear_2d_like_tensorflow1x=resize),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_a_torchscript_file_gets_resized_images_around_zero(fidelity, tmp_path):
    class Corner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 0, 0, 0], x[:, 0, 298, 298]], 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(Corner(), torch.zeros(1, 3, 299, 299)), str(tmp_path / "net.pt"))
    extracted = features.extract(features.inception(tmp_path / "net.pt"), BYTES[:7], quiet=True)
    corners = torch.from_numpy(BYTES[:7, 0][:, [0, -1], [0, -1]]).float()
    torch.testing.assert_close(extracted, (corners - 128) / 128)


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_weights_file_cannot_run_code(fidelity, tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth: neither"):
        features.inception(tmp_path / "evil.pth")
    assert "code was run" not in capsys.readouterr().out


def test_what_is_no_weights_file_is_named(fidelity, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    with pytest.raises(InputError, match=r"notes\.txt: neither"):
        features.inception(tmp_path / "notes.txt")
    with pytest.raises(MissingInputError, match=r"lost\.pt: no such file"):
        features.inception(tmp_path / "lost.pt")


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingExtraError, match=r'pip install "poise\[eval\]"'):
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
    assert features.available_inception() == tmp_path / "mine.pt"
