"""Encoders and decoders. No loss here; any other pair of nn.Modules does as well (see `vae.VAE`).

Each factory returns `(encoder, decoder)`: the encoder maps images to `(mean, logvar)`, the decoder latents to images. For
latents of stage 1, `second_stage` returns a pair that maps latents to latents.

`resnet` and `second_stage` are those of the code released with Asperti & Trentin 2020; `infogan` and `wae` those of Dai &
Wipf 2019 (after Chen et al. 2016 and Tolstikhin et al. 2018). All of these were TensorFlow programs that relied on its
defaults, which PyTorch does not share, and which are kept here: "same" padding that puts the odd pixel of a strided
convolution at the end, BatchNorm with eps 1e-5 and a running average of decay 0.999. Their Glorot-uniform weights and zero
biases make the first steps of `resnet` and `wae` explode: there they are kept only where `initialisation="released"` asks.

That decay needs thousands of steps to settle: a short run scored in evaluation mode looks broken. `norm_decay` sets it.
"""

from poise.networks.factories import Pair, infogan, mlp, resnet, second_stage, wae

__all__ = ["Pair", "infogan", "mlp", "resnet", "second_stage", "wae"]
