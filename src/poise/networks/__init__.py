"""Encoders and decoders, and the velocity network of the flow prior.

Each factory except `flow` returns `(encoder, decoder)`. The encoder maps images to
`(mean, logvar)`, the decoder maps latents to images. `second_stage` returns a pair for the latents
of stage 1. Any other pair of `nn.Module`s may be used in their place (see `poise.VAE`).

The latents of `conv` are a small image, a latent map. It has no BatchNorm. `flow` returns the
velocity network of the flow prior, for latent maps and for vectors.

Sources. `resnet` and `second_stage` are the networks of the code released with Asperti & Trentin
2020. `infogan` and `wae` are those of Dai & Wipf 2019 (after Chen et al. 2016 and Tolstikhin et al.
2018). They were TensorFlow programs. The networks here keep TensorFlow's defaults where PyTorch's
differ:

- "same" padding, with the odd pixel of a strided convolution at the bottom and right;
- BatchNorm with eps 1e-5 and running averages of decay 0.999.

These averages need thousands of steps to settle, so that a short run looks broken in evaluation
mode. `norm_decay` sets the decay.

Initial weights. Glorot-uniform weights and zero biases make the first steps of `resnet` and `wae`
explode. These two networks use them only with `initialisation="released"`.
"""

from poise.networks.factories import Pair, conv, flow, infogan, mlp, resnet, second_stage, wae

__all__ = ["Pair", "conv", "flow", "infogan", "mlp", "resnet", "second_stage", "wae"]
