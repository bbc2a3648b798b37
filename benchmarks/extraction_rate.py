"""Measure images per second of the feature extractors, for several ways to run the networks.

    python benchmarks/extraction_rate.py [--inception FILE ...] [--rounds 7]
        [--json results/bench-extraction-rate.json]

Processes take turns, round by round: large float32 matrix products, each way to run a network on
one prepared batch, and the package's whole extractor on 32x32 bytes. The share of the matrix rate
is the network's FLOPs (counted by torch, a multiply-add as two) times images per second, over the
FLOPs per second of the matrix products in the same round. The report also has each way's largest
deviation from the network as loaded. Ways that this machine cannot run (a compiler, OpenVINO) are
listed as left out.
"""

import argparse
import contextlib
import copy
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Worker,
    machine,
    matrix_products,
    over,
    send,
    serve,
    show,
    summary,
    take_turns,
    write_report,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from poise.errors import InputError
from poise.features import Extractor, available_inception, extract, inception, make_extractor
from poise.features.extractor import CPU_BATCH
from poise.features.light import PACKAGE as LIGHT_PACKAGE

Forward = Callable[[Tensor], Tensor]
WHOLE = "whole extractor, 32x32 bytes"


def as_loaded(network: nn.Module, batch: Tensor) -> Forward:
    return network


def channels_last(network: nn.Module, batch: Tensor) -> Forward:
    placed = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return lambda images: placed(images.contiguous(memory_format=torch.channels_last))


def folded(network: nn.Module, batch: Tensor) -> Forward:
    """Fold batch normalisation into convolutions; use channels_last."""
    if isinstance(network, torch.jit.ScriptModule):
        raise InputError("a TorchScript network cannot be folded here: freeze it instead")
    pairs = [
        layer
        for layer in network.modules()
        if isinstance(getattr(layer, "bn", None), nn.BatchNorm2d)
    ]
    if not pairs:
        raise InputError("the network has no batch normalisation left to fold")
    for layer in pairs:
        layer.conv = torch.nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn)  # pyright: ignore[reportArgumentType]
        layer.bn = nn.Identity()
    return channels_last(network, batch)


def unfolded(network: nn.Module, batch: Tensor) -> Forward:
    """Add an identity batch normalisation after every convolution; use channels_last."""
    if isinstance(network, torch.jit.ScriptModule) or any(
        isinstance(layer, nn.BatchNorm2d) for layer in network.modules()
    ):
        raise InputError("the network has its batch normalisation already")
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
    """Apply torch.jit.optimize_for_inference: oneDNN's own layout, fused activations."""
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


def prepared(extractor: Extractor, images: Tensor) -> Tensor:
    """Resize and normalise images of bytes into the network's input."""
    module: Any = extractor.network
    return ((module.resize(images.float()) - module.shift) / module.divisor).contiguous()


def flops(network: nn.Module, batch: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        network(batch[:1])
    return float(counter.get_total_flops())


def work(name: str, way: str, images: int) -> None:
    """Serve the turns of one way to run a network, in its own process.

    The first report has the GFLOP per image and the way's largest deviation, or the error with
    which the way failed.
    """
    cpu = torch.device("cpu")
    if name == "matrix":
        products, products_flops = matrix_products(cpu, 1.0)
        send({"flops": products_flops})
        serve(lambda amount: products, cpu)
        return
    source = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=source)
    extractor = make_extractor("light") if name == "light" else inception(Path(name))
    module: Any = extractor.network
    batch = prepared(extractor, bytes_)
    gflop = flops(module.network, batch) / 1e9
    if way == WHOLE:
        send({"gflop": gflop})
        serve(lambda amount: lambda: extract(extractor, bytes_), cpu)
        return
    try:
        expected = module.network(batch)
        forward = next(w for w in WAYS if w.__name__ == way)(copy.deepcopy(module.network), batch)
        for _ in range(2):
            forward(batch)
        given = forward(batch)
    except Exception as error:  # a compiler can fail in any way; report why
        send({"left_out": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
        return
    send({"gflop": gflop, "largest_deviation": float((given - expected).abs().max())})
    serve(lambda amount: lambda: forward(batch), cpu)


def measure(name: str, images: int, rounds: int) -> dict[str, Any]:
    """Measure all ways to run a network, in turns with matrix products."""
    ways = [*(way.__name__ for way in WAYS), WHOLE]
    command = [__file__, "--images", str(images), "--work"]
    workers = {way: Worker([*command, name, way]) for way in ways}
    workers["matrix"] = Worker([*command, "matrix", ""])
    facts = {way: worker.ready for way, worker in workers.items()}
    left_out = {way: fact["left_out"] for way, fact in facts.items() if "left_out" in fact}
    found = {way: worker for way, worker in workers.items() if way not in left_out}
    take_turns(found, dict.fromkeys(found, 1), 1)
    times = take_turns(found, dict.fromkeys(found, 1), rounds)
    for worker in workers.values():
        worker.end()
    matrix_flops = [facts["matrix"]["flops"] / second for second in times.pop("matrix")]
    gflop = facts[WHOLE]["gflop"]
    rows: dict[str, dict[str, Any]] = {}
    for way, values in times.items():
        rates = [images / second for second in values]
        share = over([1e9 * gflop * rate for rate in rates], matrix_flops)
        rows[way] = {"images_per_second": summary(rates), "share_of_matrix_rate": share}
        if "largest_deviation" in facts[way]:
            rows[way]["largest_deviation"] = facts[way]["largest_deviation"]
    return {
        "gflop_per_image": round(gflop, 3),
        "matrix_gflop_per_second": summary([rate / 1e9 for rate in matrix_flops]),
        "left_out": left_out,
        "ways": rows,
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
        help="files of Inception's weights (default: the file that Poise finds)",
    )
    parser.add_argument("--images", type=int, default=CPU_BATCH, help="images per batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("results/bench-extraction-rate.json"))
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", r"`torch\.jit")  # deprecated, but still measured
    if options.work:
        name, way = options.work
        with contextlib.redirect_stdout(sys.stderr):
            work(name, way, options.images)
        return
    default = [path for path in [available_inception()] if path]
    files = default if options.inception is None else options.inception
    names = [str(path) for path in files] + ["light"] * bool(find_spec(LIGHT_PACKAGE))
    networks = {name: measure(name, options.images, options.rounds) for name in names}
    for name, found in networks.items():
        rates = ("images_per_second", "share_of_matrix_rate")
        show([[name, *rates], *([way, *map(row.get, rates)] for way, row in found["ways"].items())])
    report = {"images_in_a_batch": options.images, "rounds": options.rounds, "networks": networks}
    write_report(options.json, machine(torch.device("cpu")) | report)


if __name__ == "__main__":
    main()
