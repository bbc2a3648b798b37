"""Compare every network and prior with PyTorch, as an ONNX file and in the kernels of a page.

    python benchmarks/exports.py [--only resnet-32 ...] [--json results/bench-exports.json]

Needs the extra `export`, and node for the kernels. Weights are random, such that outputs depend on
inputs. "Spread" is the standard deviation over inputs of the outputs, mean over outputs.
Differences are the largest over five inputs (onnxruntime) or one (a page), absolute up to values of
1, relative above. A time is the fastest of ten runs for one input, in one thread.
"""

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import machine, write_report
from torch import Tensor, nn

from poise import networks
from poise.explore import explorer, graphs
from poise.explore.graphs import graph_of
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.priors import FlowPrior, MixturePrior, Prior, SecondStagePrior, fit_prior
from poise.runs.onnx_files import MEAN_AND_LOGVAR, Part, compare, to_onnx
from poise.runs.parts import Decoder, Encoder, Sampler
from poise.vae import VAE

RUNS = 10
PAIRS: dict[str, tuple[Callable[[], networks.Pair], tuple[int, int, int], int]] = {
    "mlp-8": (lambda: networks.mlp((1, 8, 8), 10, hidden=(256, 256)), (1, 8, 8), 10),
    "infogan-28": (lambda: networks.infogan(28), (1, 28, 28), 64),
    "resnet-32": (lambda: networks.resnet(32), (3, 32, 32), 64),
    "conv-32": (lambda: networks.conv(32), (3, 32, 32), 256),
    "conv-64": (lambda: networks.conv(64), (3, 64, 64), 256),
    "resnet-64": (lambda: networks.resnet(64), (3, 64, 64), 64),
    "wae-64": (lambda: networks.wae(64), (3, 64, 64), 64),
}


def second_stage() -> tuple[Prior, int]:
    vae = VAE(*networks.second_stage(64, 2048))
    return SecondStagePrior(vae, 64, torch.tensor(0.1)), 128


def mixture() -> tuple[Prior, int]:
    return fit_prior(
        "mixture", DiagonalGaussian(torch.randn(2_000, 64), torch.zeros(2_000, 64))
    ), 65


def flow(*shape: int) -> tuple[Prior, int]:
    made = Flow(lively(networks.flow(shape)), shape)
    return FlowPrior(made, steps=12), len(made.mean)


PRIORS: dict[str, Callable[[], tuple[Prior, int]]] = {
    "second-stage, 64 latents, 2048 wide": second_stage,
    "mixture, 64 latents": mixture,
    "flow, 64 latents, 12 steps": lambda: flow(64),
    "flow, map 4x8x8, 12 steps": lambda: flow(4, 8, 8),
}


def lively(module: nn.Module) -> nn.Module:
    """Give a module random weights that keep the size of its input, and no zero weights.

    With PyTorch's initial weights, deep networks return almost the same for every input.
    """
    for tensor in module.parameters():
        if tensor.dim() > 1:
            tensor.data.normal_(std=(2 / tensor[0].numel()) ** 0.5)
        elif not tensor.any():
            tensor.data.normal_(std=0.1)
    for name, tensor in module.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return module.eval()


@torch.no_grad()
def settled(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Set the averages of BatchNorm to those of a batch, and return the module for evaluation."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over batches
    module.train()(inputs)
    return module.eval()


def parts(only: list[str] | None) -> list[Part]:
    made = []
    for name, prior in PRIORS.items():
        if only is None or name in only:
            module, size = prior()
            made.append(
                Part(name, Sampler(module), torch.randn(3, size), "noise", ("latents",), {})
            )
    for name, (pair, shape, latents) in PAIRS.items():
        if only is None or name in only:
            encoder, decoder = map(lively, pair())
            settled(encoder, torch.rand(50, *shape))
            vae = VAE(encoder, settled(decoder, torch.randn(50, latents)))
            images, codes = torch.rand(3, *shape), torch.randn(3, latents)
            made += [
                Part(f"{name} encoder", Encoder(vae), images, "images", MEAN_AND_LOGVAR, {}),
                Part(f"{name} decoder", Decoder(vae), codes, "latents", ("images",), {}),
            ]
    return made


@torch.no_grad()
def spread(part: Part) -> float:
    outputs = part.module(part.example)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return round(min(output.std(0).mean().item() for output in outputs), 4)


def in_onnx(part: Part) -> dict[str, float]:
    start = time.perf_counter()
    model = to_onnx(part)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "mb": round(model.ByteSize() / 1e6, 2),
        "difference": compare(part, model),
    }


def in_a_page(part: Part) -> dict[str, float]:
    module, inputs = part.module, [part.example[:1]]
    if isinstance(module, Sampler) and isinstance(module.prior, FlowPrior):
        module, inputs = module.prior.flow, [part.example[:1], torch.tensor([0.3])]
    graph = graph_of(module, inputs, part.name)
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    given = {
        "graph": graph.description(),
        "weights": explorer.encoded(graph.constants.values()),
        "inputs": [tensor.flatten().tolist() for tensor in inputs],
    }
    kernels = (Path(graphs.__file__).parent / "templates" / "kernels.js").read_text()
    code = f"""{kernels}
    const {{ graph, weights, inputs }} = JSON.parse(require("fs").readFileSync(0));
    const network = new Kernels.Network(graph, Buffer.from(weights, "base64"));
    let outputs, best = Infinity;
    for (let k = 0; k < {RUNS}; k++) {{
      const start = performance.now();
      outputs = network.run(...inputs);
      best = Math.min(best, performance.now() - start);
    }}
    console.log(JSON.stringify([best, outputs.map((output) => [...output])]));"""
    done = subprocess.run(
        ["node", "--eval", code],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
    )
    best, outputs = json.loads(done.stdout)
    differences = [
        off(torch.tensor(theirs), ours.flatten())
        for theirs, ours in zip(outputs, expected, strict=True)
    ]
    return {"ms": round(best, 1), "difference": max(differences)}


def off(theirs: Tensor, ours: Tensor) -> float:
    return ((theirs - ours).abs() / ours.abs().clamp_min(1)).max().item()


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| network or prior | spread | ONNX, MB | ONNX, difference | page, difference | page, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        onnx, page = row["onnx"], row.get("page")
        kernels = f"{page['difference']:.1e} | {page['ms']:.1f}" if page else " | "
        cells = (name, f"{row['spread']:.2f}", f"{onnx['mb']:.2f}", f"{onnx['difference']:.1e}")
        lines.append(f"| {' | '.join(cells)} | {kernels} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks and priors")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for part in parts(options.only):
        rows[part.name] = {"spread": spread(part), "onnx": in_onnx(part)}
        # A page draws from a mixture by a function of its own (templates/model.js).
        own = isinstance(part.module, Sampler) and isinstance(part.module.prior, MixturePrior)
        if shutil.which("node") and not own:
            rows[part.name]["page"] = in_a_page(part)
        print(part.name, rows[part.name], flush=True)
    print(table(rows))
    if options.json:
        write_report(options.json, {"machine": machine(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
