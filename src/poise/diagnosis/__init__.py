"""Diagnose a VAE: name what is wrong, with the figures that show it and one remedy.

Posterior collapse, an imbalance and a wrong data range look alike but need different remedies.

One number describes how strongly a VAE is regularised. The loss per image is c SE + k KL, where SE
is the squared error summed over D dimensions. This is k times the loss with the decoder variance

    gamma2_eff = k / (2 c).                                                                   (1)

The loss is balanced if gamma2_eff = MSE (eq. 2 of `poise.balance`). The ratio gamma2_eff / MSE is
the *equivalent beta*.

If the loss function is given, c and k are read from its gradients (`weight.loss_weights`), and so
is the cause of an imbalance.

If it is not given, gamma2_eff is inferred from the trained model. With z = mu + s eps, the loss is
stationary in the s_j of a latent if

    c E[dSE/dz_j eps_j] = k (1 / s_j - s_j).                                                  (2)

Multiplied by s_j and summed over images and active latents, this becomes

    gamma2_eff = sum E[dSE/dz_j eps_j s_j] / (2 sum (1 - s_j^2)).                             (3)

Equation (3) is exact at a minimum for any decoder, because the bias of the logvar head makes the
sum over images stationary. For a linear decoder it is ||w_j||^2 s_j^2 / (1 - s_j^2) (Lucas et al.
2019, arXiv 1911.02469). On trained VAEs its error is within 5 % (tests/test_diagnosis.py).

If every latent has collapsed, (3) is 0/0 and only a bound remains. A linear VAE encodes a direction
of variance lambda as soon as lambda > gamma2_eff (Tipping & Bishop 1999).

In reading order: `verdict` (the result, and the thresholds), `subject` (the inputs, and what the
model returns for images), `outputs` (decoder range, dead layers, samples against images), `weight`
(weights of error and KL in the loss), `facts` (all measurements), `broken` and `causes` (from
measurements to findings), `examine` (the order of all steps).
"""

from poise.diagnosis.examine import diagnose
from poise.diagnosis.verdict import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
