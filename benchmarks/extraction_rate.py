"""Images per second of the feature extractors as a share of the machine's matrix rate, for many ways to run the networks.

    python benchmarks/extraction_rate.py [--inception FILE ...] [--rounds 7] [--json results/bench-extraction-rate.json]

Measured in turn, round by round, so that a change of the machine's pace hits all alike: a large float32 matrix product, each
way to run each network on one prepared batch, and the whole extractor of the package on 32x32 bytes. The share is the
network's FLOPs (counted by torch, a multiply-add as two) times images per second, over the matrix product's FLOPs per second
in the same round. Each way's largest deviation from the network as it was loaded stands beside its rate. What the machine
has no means for (a compiler, OpenVINO) is left out and named.
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from poise.errors import InputError
from poise.features import Extractor, available_inception, extract, inception, make_extractor
from poise.features.extractor import CPU_BATCH
from poise.features.light import PACKAGE as LIGHT_PACKAGE

Forward = Callable[[Tensor], Tensor]
MATRIX_SIDE = 2048


def as_loaded(network: nn.Module, batch: Tensor) -> Forward:
    return network


def channels_last(network: nn.Module, batch: Tensor) -> Forward:
    placed = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return lambda images: placed(images.contiguous(memory_format=torch.channels_last))


def folded(network: nn.Module, batch: Tensor) -> Forward:
    """Batch normalisation folded into convolutions, channels_last."""
    if isinstance(network, torch.jit.ScriptModule):
        raise InputError("a TorchScript network is folded by freezing")
    pairs = [
        layer
        for layer in network.modules()
        if isinstance(getattr(layer, "bn", None), nn.BatchNorm2d)
    ]
    if not pairs:
        raise InputError("nothing is left to fold")
    for layer in pairs:
        layer.conv = torch.nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn)  # pyright: ignore[reportArgumentType]
        layer.bn = nn.Identity()
    return channels_last(network, batch)


def unfolded(network: nn.Module, batch: Tensor) -> Forward:
    """A batch normalisation (that changes nothing) behind every convolution, channels_last."""
    if isinstance(network, torch.jit.ScriptModule) or any(
        isinstance(layer, nn.BatchNorm2d) for layer in network.modules()
    ):
        raise InputError("it has its batch normalisations")
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                setattr(
                    parent,
                    name,
                    nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels, eps=0).eval()),
                )
    return channels_last(network, batch)


def frozen(network: nn.Module, batch: Tensor) -> Forward:
    scripted = (
        network if isinstance(network, torch.jit.ScriptModule) else torch.jit.trace(network, batch)
    )
    return torch.jit.freeze(scripted)  # pyright: ignore[reportArgumentType]


def frozen_channels_last(network: nn.Module, batch: Tensor) -> Forward:
    script = frozen(network.to(memory_format=torch.channels_last), batch)  # pyright: ignore[reportCallIssue]
    return lambda images: script(images.contiguous(memory_format=torch.channels_last))


def optimized(network: nn.Module, batch: Tensor) -> Forward:
    """torch.jit.optimize_for_inference: frozen, convolutions in oneDNN's own layout with their activations fused."""
    return torch.jit.optimize_for_inference(frozen(network, batch))  # pyright: ignore[reportArgumentType]


def compiled(network: nn.Module, batch: Tensor) -> Forward:
    if isinstance(network, torch.jit.ScriptModule):
        raise InputError("a TorchScript network cannot be compiled")
    return torch.compile(channels_last(network, batch))


def openvino(network: nn.Module, batch: Tensor) -> Forward:
    import openvino  # pyright: ignore[reportMissingImports]

    converted = openvino.convert_model(network, example_input=batch[:1])
    run = openvino.compile_model(
        converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"}
    )
    return lambda images: torch.from_numpy(run(images.numpy())[0])


WAYS = (
    as_loaded,
    channels_last,
    folded,
    unfolded,
    frozen,
    frozen_channels_last,
    optimized,
    compiled,
    openvino,
)


def ways(extractor: Extractor, batch: Tensor) -> tuple[dict[str, Forward], dict[str, str]]:
    """Each way to run a network, warmed up; and those that are not to be had here, with the reason."""
    network: Any = extractor.network
    found, left_out = {}, {}
    for way in WAYS:
        try:
            forward = way(copy.deepcopy(network.network), batch)
            for _ in range(3):
                forward(batch)
            found[way.__name__] = forward
        except Exception as error:  # a compiler can fail in any way; the reason is reported
            left_out[way.__name__] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found, left_out


def prepared(extractor: Extractor, images: Tensor) -> Tensor:
    """What the network itself is given for images of bytes."""
    module: Any = extractor.network
    return ((module.resize(images.float()) - module.shift) / module.divisor).contiguous()


def flops(network: nn.Module, batch: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        network(batch[:1])
    return float(counter.get_total_flops())


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(
    tasks: dict[tuple[str, str], Callable[[], Any]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    times: dict[tuple[str, str], list[float]] = {task: [] for task in tasks}
    for _ in range(rounds):
        for task, run in tasks.items():
            times[task].append(seconds(run))
    return times


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inception",
        type=Path,
        nargs="*",
        help="files of Inception's weights; by default the one at hand",
    )
    parser.add_argument("--images", type=int, default=CPU_BATCH, help="in a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", r"`torch\.jit")  # deprecated, and measured nevertheless
    files = (
        options.inception
        if options.inception is not None
        else [path for path in [available_inception()] if path]
    )
    extractors = {f"inception, {path.suffix}": inception(path) for path in files}
    if find_spec(LIGHT_PACKAGE):
        extractors["light"] = make_extractor("light")
    bytes_ = torch.randint(
        0,
        256,
        (options.images, 3, 32, 32),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE)
    tasks: dict[tuple[str, str], Callable[[], Any]] = {
        ("matrix", "product"): partial(torch.mm, matrix, matrix)
    }
    networks: dict[str, dict[str, Any]] = {}
    for name, extractor in extractors.items():
        module: Any = extractor.network
        batch = prepared(extractor, bytes_)
        expected = module.network(batch)
        found, left_out = ways(extractor, batch)
        deviations = {
            way: float((forward(batch) - expected).abs().max()) for way, forward in found.items()
        }
        gflop = flops(module.network, batch) / 1e9
        networks[name] = {
            "gflop_per_image": round(gflop, 3),
            "deviations": deviations,
            "left_out": left_out,
        }
        tasks |= {(name, way): partial(forward, batch) for way, forward in found.items()}
        tasks[name, "whole extractor, 32x32 bytes"] = partial(extract, extractor, bytes_)
    measure(tasks, 1)
    times = measure(tasks, options.rounds)
    gflops = [2 * MATRIX_SIDE**3 / 1e9 / s for s in times["matrix", "product"]]
    for (name, way), values in times.items():
        if name == "matrix":
            continue
        rates = [options.images / s for s in values]
        shares = [
            networks[name]["gflop_per_image"] * rate / most
            for rate, most in zip(rates, gflops, strict=True)
        ]
        figures = {"images_per_second": summary(rates), "share_of_matrix_rate": summary(shares)}
        if way in networks[name]["deviations"]:
            figures["largest_deviation"] = networks[name]["deviations"].pop(way)
        networks[name].setdefault("ways", {})[way] = figures
    report = {
        "images_in_a_batch": options.images,
        "rounds": options.rounds,
        "matrix_gflop_per_second": summary(gflops),
        "networks": networks,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cpu",
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
