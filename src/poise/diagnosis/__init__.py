"""What is wrong with a VAE, in plain words: collapse, imbalance and a wrong data range look alike, and have other cures.

How strongly a VAE is regularised is one number. Its loss, per image, is c SE + k KL, with SE the squared error summed over
D dimensions: that is k times the loss of a decoder variance

    gamma2_eff = k / (2 c),                                                                                         (1)

and the balance is right where gamma2_eff = MSE (eq. 2 of `poise.balance`). The ratio of the two is the *equivalent beta*.

With the loss function at hand, c and k are read from its gradients (`weight.loss_weights`), and so is their cause.

Without it, they are read from the trained model. With z = mu + s eps, the loss is stationary in the s_j of a latent where

    c E[dSE/dz_j eps_j] = k (1 / s_j - s_j).                                                                        (2)

Times s_j, and summed over images and active latents, this gives

    gamma2_eff = sum E[dSE/dz_j eps_j s_j] / (2 sum (1 - s_j^2)),                                                   (3)

exact at a minimum whatever the decoder, since the bias of the head that gives logvar makes the sum over images stationary
(for a linear decoder it is ||w_j||^2 s_j^2 / (1 - s_j^2): Lucas et al. 2019, arXiv 1911.02469). On trained VAEs it comes
within 5 % of the truth (tests/test_diagnosis.py). Where every latent has collapsed, (3) is 0/0, and a bound remains: in a
linear VAE a direction of variance lambda is encoded as soon as lambda > gamma2_eff (Tipping & Bishop 1999).

In reading order: `verdict` (what comes out, and the limits), `subject` (what is given, and what the model makes of images),
`outputs` (range, dead layers, samples against images), `weight` (how the loss weighs its parts), `facts` (all of that),
`broken` and `causes` (figures -> findings), `examine`.
"""

from poise.diagnosis.examine import diagnose
from poise.diagnosis.verdict import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
