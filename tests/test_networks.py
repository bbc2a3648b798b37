"""Compare parameter counts and TensorFlow's defaults with METHOD's table, scipy and closed forms.

Networks whose values do not matter are on the meta device: shapes and counts without memory or
time.
"""

import copy
import math
import re

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from poise import VAE, ComputedBalance
from poise.errors import InputError
from poise.networks import Pair, conv, flow, infogan, mlp, resnet, second_stage, wae
from poise.networks.layers import SameConv2d, SameConvTranspose2d, SpectrallyNormalised, WideLinear

LATENTS = 8


def awake(*networks: nn.Module) -> tuple[nn.Module, ...]:
    """Replace weights that start at zero by small random ones."""
    for network in networks:
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return networks


SMALL = {  # smallest network of each kind, and the shape of one input
    "resnet": (lambda: resnet(8, 3, LATENTS, scales=2), (3, 8, 8)),
    "released resnet": (
        lambda: resnet(8, 3, LATENTS, scales=2, initialisation="released"),
        (3, 8, 8),
    ),
    "released wae": (lambda: wae(8, 1, LATENTS, initialisation="released"), (1, 8, 8)),
    "conv": (lambda: awake(*conv(8, 3, 2, width=16)), (3, 8, 8)),
    "infogan": (lambda: infogan(8, 1, LATENTS), (1, 8, 8)),
    "wae": (lambda: wae(8, 1, LATENTS), (1, 8, 8)),
    "mlp": (lambda: mlp((1, 4, 4), LATENTS, hidden=(16, 8)), (1, 4, 4)),
    "linear mlp": (lambda: mlp(10, LATENTS, hidden=(), output="linear"), (10,)),
    "second stage": (lambda: second_stage(LATENTS, hidden=16), (LATENTS,)),
}


@pytest.fixture(params=SMALL)
def network(request) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return encoder, decoder and a batch of inputs."""
    make, shape = SMALL[request.param]
    return *make(), torch.rand(5, *shape)


def on_meta(make, *args, **options) -> Pair:
    with torch.device("meta"):
        return make(*args, **options)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# Sizes and counts


@pytest.mark.parametrize(
    ("make", "args", "encoder", "decoder"),
    [
        (resnet, (32, 3, 64), 1_135_840, 4_054_627),
        (resnet, (64, 3, 64), 3_333_344, 15_988_323),
        (second_stage, (64, 2048), None, 17_457_344),
        (second_stage, (64, 4096), None, 68_456_640),
    ],
    ids=["CIFAR-10", "CelebA-64", "CIFAR-10 stage 2", "CelebA-64 stage 2"],
)
def test_parameter_counts_are_the_released_ones(make, args, encoder, decoder):
    counts = [count(module) for module in on_meta(make, *args)]
    assert counts == [encoder, decoder] if encoder else sum(counts) == decoder


@pytest.mark.parametrize(
    ("make", "sizes"), [(resnet, (8, 12, 28, 32, 64)), (infogan, (8, 28, 32)), (wae, (8, 32, 64))]
)
def test_images_of_every_allowed_size_come_back_in_shape(make, sizes):
    for size in sizes:
        encoder, decoder = on_meta(make, size, 2, LATENTS)
        images = torch.empty(3, 2, size, size, device="meta")
        mean, logvar = encoder(images)
        assert mean.shape == logvar.shape == (3, LATENTS)
        assert decoder(mean).shape == images.shape


@pytest.mark.parametrize(
    ("size", "channels", "side"),
    [(8, 3, 2), (28, 1, 7), (32, 3, 8), (60, 3, 15), (64, 3, 8), (128, 3, 16), (256, 1, 16)],
)
def test_latent_maps_are_vectors_outside(size, channels, side):
    encoder, decoder = on_meta(conv, size, channels, 5)
    images = torch.empty(2, channels, size, size, device="meta")
    mean, logvar = encoder(images)
    assert encoder.latent_shape == decoder.latent_shape == (5, side, side)
    assert mean.shape == logvar.shape == (2, 5 * side * side)
    assert decoder(mean).shape == images.shape
    velocity = on_meta(flow, encoder.latent_shape)
    assert velocity.latent_shape == encoder.latent_shape
    assert velocity(mean, torch.empty(2, device="meta")).shape == mean.shape


def test_vectors_and_images_pass_through_dense_networks(network):
    encoder, decoder, inputs = network
    mean, logvar = encoder(inputs)
    assert mean.shape == logvar.shape == (5, LATENTS)
    assert decoder(mean).shape == inputs.shape


@pytest.mark.parametrize(
    ("make", "size", "options"),
    [
        (resnet, 30, {}),
        (resnet, 4, {}),
        (resnet, 0, {}),
        (resnet, 36, {"scales": 4}),
        (resnet, 8, {"scales": 5}),
        (infogan, 30, {}),
        (infogan, 4, {}),
        (conv, 30, {}),
        (conv, 4, {}),
        (conv, 100, {}),
        (conv, 140, {}),
        (wae, 28, {}),
        (wae, 60, {}),
    ],
)
def test_other_sizes_are_refused_with_two_that_work(make, size, options):
    with pytest.raises(InputError, match=rf"not {size}: resize to") as caught:
        on_meta(make, size, **options)
    for better in re.findall(r"resize to (\d+) or (\d+)", str(caught.value))[0]:
        on_meta(make, int(better), **options)


@pytest.mark.parametrize("scales", [0, -1])
def test_a_resnet_needs_a_scale(scales):
    with pytest.raises(InputError, match="scales"):
        on_meta(resnet, 32, scales=scales)


@pytest.mark.parametrize(
    ("make", "args", "options", "words"),
    [
        (conv, (32,), {"width": 20}, "multiples of 8, not 20"),
        (flow, ((4, 8, 8),), {"width": 0}, "multiples of 8, not 0"),
        (flow, ((4, 8),), {}, r"\(L,\) or \(c, h, w\), not \(4, 8\)"),
        (flow, ((4, 8, 8),), {"blocks": 2}, "3 blocks or more here, not 2"),
        (flow, ((4,),), {"blocks": 0}, "1 blocks or more here, not 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, args, options, words):
    with pytest.raises(InputError, match=words):
        on_meta(make, *args, **options)


def test_an_unknown_output_is_refused(unchecked):
    with pytest.raises(InputError, match="tanh"):
        mlp(4, 2, output="tanh")


# Convolutions as TensorFlow pads them


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("size", [7, 8])
def test_same_convolution_pads_the_odd_pixel_at_the_end(size, kernel, stride):
    layer = SameConv2d(2, 3, kernel, stride=stride).double()
    images = torch.rand(2, 2, size, size + 1, dtype=torch.float64)

    def padding(length: int) -> tuple[int, int]:
        total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
        return total // 2, total - total // 2

    padded = np.pad(images.numpy(), ((0, 0), (0, 0), padding(size), padding(size + 1)))
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = [
        [correlate(image, w, "valid")[0, ::stride, ::stride] for w in weight] for image in padded
    ]
    np.testing.assert_allclose(
        layer(images).detach().numpy(), np.array(expected) + bias[:, None, None], rtol=1e-10
    )


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("size", [2, 6])
def test_the_transposed_convolution_is_the_adjoint_of_the_strided_one(kernel, size):
    down, up = (
        SameConv2d(3, 4, kernel, stride=2).double(),
        SameConvTranspose2d(4, 3, kernel).double(),
    )
    up.weight = down.weight
    for layer in (down, up):
        nn.init.zeros_(layer.bias)
    large = torch.randn(2, 3, 2 * size, 2 * size, dtype=torch.float64)
    small = torch.randn(2, 4, size, size, dtype=torch.float64)
    torch.testing.assert_close(
        (down(large) * small).sum(), (large * up(small)).sum(), rtol=1e-10, atol=0
    )


# Initial weights and normalisation


@pytest.mark.parametrize("kind", ["released resnet", "released wae", "mlp", "second stage"])
def test_weights_are_glorot_uniform_and_biases_zero(kind):
    for network in SMALL[kind][0]():
        for layer in network.modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                continue
            fan_sum = sum(layer.weight.shape[:2]) * math.prod(layer.weight.shape[2:])
            bound = math.sqrt(6 / fan_sum) * (1 + 1e-6)
            weight = layer.weight.detach()
            assert bound * (1 - 20 / weight.numel()) < float(weight.abs().max()) <= bound
            spread = float(weight.square().mean().sqrt()) / (bound / math.sqrt(3))
            assert spread == pytest.approx(1, abs=3 / math.sqrt(weight.numel()))
            assert layer.bias.eq(0).all()


@pytest.mark.parametrize("kind", ["resnet", "wae"])
def test_weights_and_biases_are_what_pytorch_draws(kind):
    for network in SMALL[kind][0]():
        for layer in network.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                # PyTorch swaps inputs and outputs of a transposed convolution
                bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
                for values in (layer.weight.detach(), layer.bias.detach()):
                    assert (
                        bound * (1 - 20 / values.numel())
                        < float(values.abs().max())
                        <= bound * (1 + 1e-6)
                    )


@pytest.mark.parametrize("count", [100, 10_000])
def test_a_wide_layer_moves_no_faster_however_much_it_sees(count):
    layer, inputs = WideLinear(count, 1), torch.rand(1, count)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    before = layer(inputs)
    before.sum().backward()
    optimizer.step()
    moved = float((before - layer(inputs)).detach())
    assert moved == pytest.approx(1e-3 * (float(inputs.sum()) / math.sqrt(count) + 1), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "side"), [(resnet, 64), (wae, 32)])
def test_the_first_steps_do_not_explode(make, side):
    """Released weights reach a KL of 81 nats (resnet) and 2e19 (wae) here within three steps."""
    images = torch.ones(8, 3, side, side)
    images[:, :, 10:50:13] = images[:, :, :, 5:60:17] = 0
    vae, balance = VAE(*make(side, 3, 16)), ComputedBalance()
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-4)
    for _ in range(3):
        reconstruction, posterior = vae(images)
        terms = balance(reconstruction, images, posterior.mean, posterior.logvar)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        assert terms.kl < 40


def test_infogan_weights_are_normal_with_std_0_02():
    for network in SMALL["infogan"][0]():
        for name, value in network.named_parameters():
            if value.dim() > 1:
                assert float(value.detach().std()) == pytest.approx(
                    0.02, abs=0.05 / math.sqrt(value.numel())
                ), name
            elif name.endswith("bias"):
                assert value.eq(0).all(), name


@pytest.mark.parametrize(("options", "momentum"), [({}, 0.001), ({"norm_decay": 0.9}, 0.1)])
@pytest.mark.parametrize("make", [resnet, infogan, wae])
def test_batch_norm_has_tensorflows_settings(make, options, momentum):
    norms = [
        layer
        for network in on_meta(make, 16, 1, LATENTS, **options)
        for layer in network.modules()
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    ]
    assert len(norms) > 2
    assert {layer.eps for layer in norms} == {1e-5}
    assert [layer.momentum for layer in norms] == pytest.approx([momentum] * len(norms))


def test_the_layers_of_the_infogan_encoder_have_spectral_norm_one():
    encoder, images = SMALL["infogan"][0]()[0], torch.rand(5, 1, 8, 8)
    for _ in range(30):  # one power iteration each
        encoder(images)
    layers = [
        layer.eval() for layer in encoder.modules() if isinstance(layer, SpectrallyNormalised)
    ]
    exact = [
        float(torch.linalg.matrix_norm(layer.layer.weight.detach().flatten(1), 2))
        for layer in layers
    ]
    assert [layer.spectral_norm().item() for layer in layers] == pytest.approx(exact, rel=0.03)
    assert len(exact) == 5


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(lambda: nn.Linear(7, 5), (3, 7)), (lambda: nn.Conv2d(3, 5, 4, 2, 1), (3, 3, 8, 8))],
    ids=["dense", "conv"],
)
def test_spectral_normalisation_computes_what_torchs_does(make, inputs):
    theirs = make().double()
    mine = SpectrallyNormalised(copy.deepcopy(theirs)).double()
    theirs = spectral_norm(theirs)
    norm = theirs.parametrizations.weight[0]
    norm._u.copy_(mine.u)
    norm._v.copy_(mine.v)
    for step in range(4):
        batch = torch.randn(inputs, dtype=torch.float64)
        outputs = [layer.train(step < 3)(batch) for layer in (mine, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        weights = [mine.layer.weight, theirs.parametrizations.weight.original]
        gradients = [
            torch.autograd.grad(y.square().sum(), w)[0]
            for y, w in zip(outputs, weights, strict=True)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for weight in weights:
                weight.add_(gradients[0], alpha=-0.01)


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norms_are_as_precise_in_mixed_precision(training):
    layer = SpectrallyNormalised(nn.Linear(300, 200)).train(training)
    mixed = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mixed.spectral_norm()
    assert inside.dtype == torch.float32 and torch.equal(inside, layer.spectral_norm())


# What the networks compute


def test_gradients_reach_every_parameter(network):
    encoder, decoder, inputs = network
    encoder.eval()  # in training mode batch norms cancel the preceding biases
    decoder.eval()
    mean, logvar = encoder(inputs)
    output = decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    (output.square().sum() + mean.square().sum() + logvar.sum()).backward()
    for part in (encoder, decoder):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "kind", ["resnet", "wae", "released wae", "mlp", "linear mlp", "second stage"]
)
def test_the_second_head_gives_the_log_standard_deviation(kind):
    make, shape = SMALL[kind]
    encoder = make()[0].eval()
    inputs = torch.rand(2, *shape)
    mean, logvar = encoder(inputs)
    encoder.log_std.bias.data += 0.25
    torch.testing.assert_close(encoder(inputs), (mean, logvar + 0.5))


def test_the_infogan_encoder_gives_a_softplus_standard_deviation():
    encoder, images = SMALL["infogan"][0]()[0].eval(), torch.rand(2, 1, 8, 8)
    # softplus(-40) is 0, so that only the floor remains.
    nn.init.constant_(encoder.raw_std.layer.bias, -40.0)
    torch.testing.assert_close(
        (0.5 * encoder(images)[1]).exp(), torch.full((2, LATENTS), 1e-6), rtol=1e-3, atol=0
    )
    nn.init.constant_(encoder.raw_std.layer.bias, 40.0)
    torch.testing.assert_close(
        (0.5 * encoder(images)[1]).exp(), torch.full((2, LATENTS), 40.0), rtol=0.1, atol=0
    )


def test_evaluation_does_not_depend_on_the_batch(network):
    encoder, decoder, inputs = network
    encoder(inputs)  # updates the state of the batch norms
    encoder.eval()
    decoder.eval()
    together = [*encoder(inputs), decoder(encoder(inputs)[0])]
    rows = [[*encoder(row), decoder(encoder(row)[0])] for row in inputs.split(1)]
    alone = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2), (1, 3, 3)])
def test_a_velocity_starts_at_zero_and_depends_on_everything(shape):
    network = flow(shape, width=24, blocks=4)
    latents = torch.randn(6, math.prod(shape), requires_grad=True)
    time = torch.rand(6, requires_grad=True)
    assert not network(latents, time).any()
    awake(network)
    velocity = network(latents, time)
    torch.testing.assert_close(velocity[:1], network(latents[:1], time[:1]))
    velocity.square().sum().backward()
    for name, value in [*network.named_parameters(), ("latents", latents), ("time", time)]:
        assert value.grad is not None and value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name


def test_the_second_stage_sees_its_input_at_both_ends():
    for network in second_stage(LATENTS, hidden=16):
        for layer in network.features:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
        codes = network(torch.eye(LATENTS))
        for output in codes if isinstance(codes, tuple) else [codes]:
            assert torch.linalg.matrix_rank(output) == LATENTS


@pytest.mark.parametrize(("hidden", "affine"), [((), True), ((16,), False)])
def test_without_hidden_layers_an_mlp_is_affine(hidden, affine):
    encoder, decoder = mlp(10, LATENTS, hidden=hidden, output="linear")

    def keeps_means(function, *shape: int) -> bool:
        first, second = 3 * torch.randn(2, 7, *shape)
        mixed = function(0.3 * first + 0.7 * second)
        return torch.allclose(mixed, 0.3 * function(first) + 0.7 * function(second), atol=1e-5)

    parts = [keeps_means(lambda x, k=k: encoder(x)[k], 10) for k in (0, 1)] + [
        keeps_means(decoder, LATENTS)
    ]
    assert parts == [affine] * 3
