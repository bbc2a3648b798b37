"""Test the ONNX files of every network and prior in onnxruntime, if the extra is installed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import poise
from poise import networks
from poise.cli.share import Export
from poise.errors import InputError, MissingExtraError, RunError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.priors import FlowPrior, Prior, RenormalisedPrior, SecondStagePrior, fit_prior
from poise.recipes.settings import Solver
from poise.runs import onnx_files
from poise.runs.onnx_files import MEAN_AND_LOGVAR, OPSET, Part, compare, to_onnx
from poise.runs.parts import Decoder, Encoder, Sampler
from test_explore import PAIRS, lively

has_extra = True
try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401
except ModuleNotFoundError:  # any other error of theirs is a failure
    has_extra = False
needs_extra = pytest.mark.skipif(not has_extra, reason='no onnx: pip install "poise[export]"')


def second_stage(gamma2: float | None) -> SecondStagePrior:
    vae = poise.VAE(*map(lively, networks.second_stage(4, 8)))
    return SecondStagePrior(vae, 4, None if gamma2 is None else torch.tensor(gamma2))


def flow(*shape: int, steps: int, solver: Solver) -> FlowPrior:
    made = Flow(lively(networks.flow(shape, width=8, blocks=3)), shape)
    return FlowPrior(made, steps=steps, solver=solver)


CODES = DiagonalGaussian(torch.randn(300, 4), torch.full((300, 4), -2.0))
PRIORS: dict[str, Callable[[], Prior]] = {
    "mixture": lambda: fit_prior("mixture", CODES),
    "second-stage": lambda: second_stage(0.3),
    "renormalised": lambda: RenormalisedPrior(second_stage(None), 1.7),
    "flow of vectors": lambda: flow(6, steps=3, solver="heun"),
    "flow of maps": lambda: flow(2, 3, 3, steps=2, solver="euler"),
}


@needs_extra
@pytest.mark.parametrize("name", PAIRS)
def test_a_network_agrees_with_pytorch(name, unchecked):
    vae = poise.VAE(*map(lively, PAIRS[name]()))
    latents = torch.randn(3, {"conv": 36, "mlp": 3}.get(name, 4))
    images = vae.decode(latents).detach()
    for part in (
        Part("encoder", Encoder(vae), images, "images", MEAN_AND_LOGVAR, {}),
        Part("decoder", Decoder(vae), latents, "latents", ("images",), {"of": name}),
    ):
        with torch.no_grad():
            outputs = part.module(part.example)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(output.std(0).mean() > 1e-4 for output in outputs)  # else nothing is compared
        model = to_onnx(part)
        compare(part, model)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        found = session.run(None, {part.given: part.example.numpy()})
        for mine, theirs in zip(outputs, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), mine, rtol=1e-4, atol=1e-4)
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    assert {entry.key: entry.value for entry in model.metadata_props}["of"] == name


@needs_extra
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_agrees_with_pytorch(name, unchecked):
    prior = PRIORS[name]()
    part = Part(name, Sampler(prior), torch.randn(3, prior.noise_dims), "noise", ("latents",), {})
    compare(part, to_onnx(part))


@needs_extra
def test_the_command_writes_the_networks_of_a_run(
    small_run, tmp_path, monkeypatch, capsys, unchecked
):
    out = tmp_path / "files"
    Export(small_run.folder, out=out).run()
    names = ["decoder.onnx", "encoder.onnx", "prior-mixture.onnx", "prior-normal.onnx"]
    names += ["prior-second-stage.onnx"]
    assert sorted(path.name for path in out.iterdir()) == names
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    facts = {e.key: e.value for e in onnx.load(out / "prior-mixture.onnx").metadata_props}
    assert facts["noise"] == "4" and facts["image_shape"] == "1 8 8"
    monkeypatch.setattr(onnx_files, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match=r"latent_mean of encoder.onnx differs from PyTorch by"):
        Export(small_run.folder, out=out).run()


class Branching(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        return latents if latents.sum() > 0 else -latents


@needs_extra
def test_what_cannot_be_exported_is_one_line(unchecked):
    part = Part("decoder", Branching(), torch.randn(3, 2), "latents", ("images",), {})
    with pytest.raises(InputError, match="decoder cannot be exported to ONNX") as raised:
        to_onnx(part)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_extra_and_a_file_in_the_way_are_said(tmp_path, monkeypatch):
    run = poise.Run.__new__(poise.Run)  # neither is about the run
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file: give the name of a folder"):
        onnx_files.export_onnx(run, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"poise\[export\]"):
        onnx_files.export_onnx(run, Path(tmp_path))
