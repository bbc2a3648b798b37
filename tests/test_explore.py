"""Test the page that explores a run: its kernels against PyTorch, and its parts in a browser."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import poise
from browsing import CHROMIUM, browser
from poise import networks
from poise.data import gather
from poise.data.decoding import to_bytes
from poise.errors import InputError
from poise.explore import explorer, graphs, write_page
from poise.explore.graphs import Graph, graph_of
from poise.explore.scene import OF_MIXTURE, scene_of
from poise.networks.layers import SameConv2d, SameConvTranspose2d
from poise.recipes import Generation
from poise.runs.parts import Decoder, Encoder
from poise.support.seeds import drawn, noise_per_image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # they are not in src
from exports import lively

NODE = shutil.which("node")
TEMPLATES = Path(graphs.__file__).parent / "templates"
needs_node = pytest.mark.skipif(NODE is None, reason="no node here: apt-get install nodejs")


def node(code: str, given: object) -> list:
    scripts = [(TEMPLATES / name).read_text() for name in ("kernels.js", "noise.js", "model.js")]
    harness = "const given = JSON.parse(require('fs').readFileSync(0));"
    done = subprocess.run(
        [str(NODE), "--eval", "\n".join([*scripts, harness, code])],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_javascript(cases: Sequence[tuple[Graph, Sequence[Tensor]]]) -> list[list[list[list[float]]]]:
    """Return the outputs of each graph, with and without vectors of WebAssembly."""
    given = [
        {
            "graph": graph.description(),
            "weights": explorer.encoded(graph.constants.values()),
            "inputs": [tensor.flatten().tolist() for tensor in inputs],
        }
        for graph, inputs in cases
    ]
    return node(
        """
        if (!Kernels.hasVectors()) throw new Error("the WebAssembly module is not valid");
        const run = ({ graph, weights, inputs }) => [true, false].map((vectors) => {
          const network = new Kernels.Network(graph, Buffer.from(weights, "base64"), vectors);
          network.run(...inputs);  // the second run must not depend on the first
          return network.run(...inputs).map((output) => [...output]);
        });
        console.log(JSON.stringify(given.map(run)));
        """,
        given,
    )


class Other(nn.Module):
    """Operations that no network of Poise has, and operations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding="same", dilation=2, groups=2), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(6, 4, 3, 2, padding=1, output_padding=1, groups=2), nn.GELU(),
            nn.Upsample(scale_factor=2), nn.ELU(), nn.Conv2d(4, 3, 3, stride=2), nn.Softplus(),
            SameConvTranspose2d(3, 5, 5), SameConv2d(5, 3, 5, stride=2),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layers(images)
        low, high = maps.split([1, 2], 1)
        joined = torch.cat([low.abs().sqrt(), high.tanh() - 2 * low, 1 / (1 + maps.square())], 1)
        shares = joined.flatten(2).transpose(1, 2).softmax(-1)
        return (shares @ torch.ones(6, 2)).mean(1, keepdim=True) + joined.sum((2, 3))[:, None, :2]


PAIRS: dict[str, Callable[[], networks.Pair]] = {
    "resnet": lambda: networks.resnet(8, 3, 4),
    "infogan": lambda: networks.infogan(8, 1, 4),
    "wae": lambda: networks.wae(8, 1, 4),
    "mlp": lambda: networks.mlp((1, 5, 5), 3, hidden=(7,)),
    "conv": lambda: networks.conv(12, 3, 4, width=8),
}


@needs_node
def test_kernels_agree_with_pytorch_for_every_network(unchecked):
    cases: dict[str, tuple[nn.Module, list[Tensor]]] = {
        "other": (Other(), [torch.rand(1, 2, 6, 6)])
    }
    for name in PAIRS.keys() - {"wae"}:  # 26 million weights; `Other` has its layers
        vae = poise.VAE(*map(lively, PAIRS[name]()))
        latents = torch.randn(1, {"conv": 36, "mlp": 3}.get(name, 4))
        images = vae.decode(latents).detach()
        cases[f"{name} decoder"] = Decoder(vae), [latents]
        cases[f"{name} encoder"] = Encoder(vae), [torch.rand_like(images)]
    _, second = networks.second_stage(4, 8)
    cases["second stage"] = lively(second), [torch.randn(1, 4)]
    for shape in ((6,), (2, 3, 3)):
        latents = torch.randn(1, 6 if len(shape) == 1 else 18)
        flow = lively(networks.flow(shape, width=8, blocks=3))
        cases[f"flow {shape}"] = flow, [latents, torch.tensor([0.3])]
    traced = [(graph_of(module, inputs, name), inputs) for name, (module, inputs) in cases.items()]
    for (name, (module, inputs)), (graph, _), found in zip(
        cases.items(), traced, in_javascript(traced), strict=True
    ):
        with torch.no_grad():
            expected = module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(graph.outputs) == len(expected)
        for outputs in found:
            for theirs, ours in zip(outputs, expected, strict=True):
                assert ours.std() > 1e-3, name
                torch.testing.assert_close(
                    torch.tensor(theirs), ours.flatten(), atol=1e-5, rtol=1e-4, msg=name
                )


@needs_node
@pytest.mark.parametrize("seed", [0, -3, 2**40])
def test_noise_of_a_seed_is_that_of_the_package(seed):
    sizes = [1, 10, 16, 21, 64, 700]
    found = node(
        f"""console.log(JSON.stringify(given.map((size) =>
        [0, 1, 2].map((image) => [...Noise.ofImage({seed}, image + 99, size)]))));""",
        sizes,
    )
    for size, rows in zip(sizes, found, strict=True):
        torch.testing.assert_close(
            torch.tensor(rows), noise_per_image(3, size, seed, 99), atol=2e-6, rtol=1e-5
        )


@pytest.fixture(scope="module")
def page(small_run: poise.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    jaxtyping.config.update("jaxtyping_disable", True)  # torch.export would trace the checks
    try:
        return write_page(small_run, tmp_path_factory.mktemp("page") / "small.html", pictures=5)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def parts(page: Path) -> dict[str, str]:
    """Return the values, arrays and weights of a page by name."""
    return dict(
        re.findall(
            r'<script type="application/[^"]*" id="([^"]*)">(.*?)</script>', page.read_text()
        )
    )


def test_a_page_loads_nothing_and_is_small(page):
    text = page.read_text(encoding="utf-8")
    code = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "default-src 'none'" in text
    assert all(
        target.startswith(("data:", "#")) for target in re.findall(r'(?:src|href)="([^"]*)"', code)
    )
    assert not re.search(r"@import|url\(|<iframe|<object", code)
    weights = [content for name, content in parts(page).items() if name.startswith("weights")]
    assert len(weights) == 3 and len(text) - sum(map(len, weights)) < 1_000_000


@needs_node
def test_a_page_decodes_encodes_and_samples_as_the_run_does(page, small_run):
    found = node(
        """
        const { scene, ...parts } = given;
        const bytesOf = (name) => new Uint8Array(Buffer.from(parts[name], "base64"));
        const model = new Model(JSON.parse(scene), bytesOf);
        (async () => {
          const samples = [];
          for (const prior of model.scene.priors) {
            for (const image of [0, 1, 120]) {
              samples.push([...model.decode(await model.latentsOf(prior, 5, image))]);
            }
          }
          const codes = [0, 1].map((k) => model.row("codes", k));
          const halfway = model.between(...codes, 0.5);
          const image = model.decode(halfway), again = model.encode(image);
          console.log(JSON.stringify({ samples, halfway: [...image], again: [...again] }));
        })();
        """,
        parts(page),
    )
    names = [prior["name"] for prior in json.loads(parts(page)["scene"])["priors"]]
    assert names == ["normal", "second-stage", "mixture"]
    expected = torch.cat(
        [small_run.sample(1, prior=name, seed=5, first=k) for name in names for k in (0, 1, 120)]
    )
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(torch.tensor(found["samples"]), expected.flatten(1), **close)
    test = gather(small_run.test_images(), drawn(len(small_run.test_images()), 5))
    middle = small_run.interpolate(test[0], test[1], 3)[1:2]
    torch.testing.assert_close(torch.tensor(found["halfway"]), middle.flatten(), **close)
    torch.testing.assert_close(
        torch.tensor(found["again"]), small_run.encode(middle).mean[0], **close
    )


READY = """(async () => {
  const pause = () => new Promise((turn) => setTimeout(turn, 20));
  const until = async (holds) => { while (!holds()) await pause(); };
  await until(() => document.documentElement.dataset.ready === "yes");
  await until(() => document.getElementById("drawn").textContent.startsWith("Images 0 to 11"));
})()"""
SHOWN = """(async (id) => {
  for (let k = 0; k < 2; k++) await new Promise(requestAnimationFrame);
  return document.getElementById(id).toDataURL();
})"""
DROP = """(async () => {
  const blob = await new Promise((done) => document.getElementById("start").toBlob(done));
  const dropped = new DataTransfer();
  dropped.items.add(new File([blob], "a.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped }));
  while (document.getElementById("pair").hidden) await new Promise((turn) => setTimeout(turn, 20));
  return document.getElementById("error").textContent;
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_phone_shows_the_page_and_obeys_the_keyboard(page, small_run, tmp_path):
    """Keys move a slider and the map. Nothing is requested but the page itself."""
    with browser(tmp_path / "profile") as tab:
        tab.open(page, 390, 844)
        tab.run(READY)

        def changes(canvas: str, focus: str, key: str) -> bool:
            before = tab.run(f"{SHOWN}({canvas!r})")
            tab.run(f"document.getElementById({focus!r}).focus()")
            tab.press(key)
            return before != tab.run(f"{SHOWN}({canvas!r})")

        assert changes("picture", "slider-0", "ArrowRight")
        assert changes("one", "plane", "ArrowRight") and changes("picture", "plane", "Enter")
        assert changes("middle", "t", "End") and changes("start", "a", "ArrowRight")
        test = gather(small_run.test_images(), drawn(len(small_run.test_images()), 5))[1:2]
        test = to_bytes(test) / 255  # the page has its pictures as bytes
        error = (test - small_run.reconstruct(test)).square().mean()
        assert tab.run(DROP) == f"Reconstruction, MSE {error:.5f}"
        assert tab.run("document.documentElement.scrollWidth") <= 390
        requested = {url for url in tab.requested if not url.startswith("data:")}
        assert requested == {page.as_uri()} and not tab.complaints


def test_a_page_without_data_shows_reconstructions(small_run, unchecked, monkeypatch, tmp_path):
    def gone(self: poise.Run) -> None:
        raise InputError("the data are gone")

    monkeypatch.setattr(poise.Run, "test_images", gone)
    scene = scene_of(small_run, ["normal"], 10)
    assert "since the data are gone" in scene.notes[0]
    assert torch.equal(scene.arrays["codes"], small_run.codes.mean[drawn(len(small_run.codes), 10)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out": "page.txt"}, "must be an .html file"),
        ({"pictures": 1}, "at least 2, not 1"),
        ({"priors": ["flow"]}, "has no trained flow"),
    ],
)
def test_what_a_page_cannot_show_is_said(options, message, small_run, unchecked, tmp_path):
    with pytest.raises(InputError, match=message):
        write_page(small_run, tmp_path / options.pop("out", "page.html"), **options)


def test_a_model_too_large_for_a_page_is_one_line(small_run, unchecked, monkeypatch, tmp_path):
    monkeypatch.setattr(explorer, "MOST_BYTES", 100_000)
    with pytest.raises(
        InputError,
        match=r"the page would have \d MB \(decoder \d, second-stage \d, .*--priors normal",
    ):
        write_page(small_run, tmp_path / "page.html")


def test_a_mixture_too_large_for_a_page_is_left_out_unless_it_is_named(
    small_run, unchecked, monkeypatch, tmp_path
):
    """Former defect: ten classes of 512 latents made the page impossible, and were not named."""
    scene = scene_of(small_run, None, 10)
    whole = sum(explorer.sizes_of(scene).values())
    of_mixture = sum(scene.arrays[name].nbytes * 4 // 3 for name in OF_MIXTURE)
    monkeypatch.setattr(explorer, "MOST_BYTES", whole - of_mixture // 2)
    page = write_page(small_run, tmp_path / "page.html", pictures=10).read_text()
    assert "No prior mixture: its" in page and "a mixture of Gaussians" not in page
    monkeypatch.setattr(explorer, "MOST_BYTES", of_mixture // 2)
    with pytest.raises(InputError, match="mixture, codes and other arrays"):
        write_page(small_run, tmp_path / "page.html", priors=["mixture"])


def test_an_encoder_that_is_too_large_beside_its_decoder_is_left_out(
    small_run, unchecked, monkeypatch, tmp_path
):
    """Former defect: the page of a large network was refused, whatever the priors."""
    sizes = explorer.sizes_of(scene_of(small_run, ["normal"], 10))
    monkeypatch.setattr(explorer, "MOST_BYTES", sum(sizes.values()) - sizes["encoder"] // 2)
    page = write_page(small_run, tmp_path / "page.html", priors=["normal"], pictures=10).read_text()
    assert "cannot be encoded: the page would be too large" in page and 'id="own"' not in page


def test_the_page_says_where_its_images_are_not_those_of_the_command(small_run, unchecked):
    assert scene_of(small_run, None, 5).values["same"] is True
    generation = Generation(adjust_variance=True, reconstruct_from="sample")
    other = copy.copy(small_run)
    other.recipe = replace(small_run.recipe, generation=generation)
    other.data = small_run.data | {"levels": 4095}
    scene = scene_of(other, ["normal"], 5)
    assert scene.values["same"] is False and "encoder" not in scene.networks
    notes = " ".join(scene.notes)
    assert "4095 is white" in notes and "posterior means" in notes and "Samples are shown" in notes


def test_what_the_kernels_would_compute_wrongly_is_refused(unchecked):
    one, weight = torch.zeros(1, 4), torch.zeros(1, 1, 3, 3)
    for function in (
        lambda x: torch.nn.functional.conv2d(x.view(4, 1, 1, 1), weight, padding=1),
        lambda x: torch.nn.functional.conv_transpose2d(x.view(4, 1, 1, 1), weight),
        lambda x: x.clamp(min=torch.ones(4)),
        lambda x: (3 * x).to(torch.int64),
    ):
        with pytest.raises(InputError, match="poise export"):
            graph_of(lambda_module(function), [one], "the decoder")


def test_an_operation_without_a_kernel_is_named(unchecked):
    with pytest.raises(InputError, match=r"the decoder has the operation cumsum.*poise export"):
        graph_of(lambda_module(lambda x: x.cumsum(1)), [torch.zeros(1, 3)], "the decoder")
    with pytest.raises(InputError, match=r"the decoder changes a view in place \(sigmoid_\)"):
        graph_of(lambda_module(half_in_place), [torch.zeros(1, 4)], "the decoder")
    with pytest.raises(InputError, match="cannot be traced"):
        graph_of(lambda_module(lambda x: x if x.sum() > 0 else -x), [torch.zeros(1, 3)], "it")


def half_in_place(latents: Tensor) -> Tensor:
    values = 2 * latents
    values[:, :2].sigmoid_()
    return values


def lambda_module(function: Callable[[Tensor], Tensor]) -> nn.Module:
    module = nn.Module()
    module.forward = function
    return module
