"""The balance between reconstruction and KL: seven ways to set it, one contract.

A decoder that outputs the mean of a Gaussian with variance gamma^2 in each of D dimensions has, per image,

    -log p(x|z) = SE / (2 gamma^2) + D/2 log(2 pi gamma^2),        SE = sum over dimensions of (x - x^)^2,      (1)

and the loss of a VAE is the batch mean of (1) + kl_weight * KL. Everything hangs on gamma^2: large, and KL prevails and
blocks the reconstruction; small, and the latent space is never regularised.

For a fixed network, (1) averaged over the data is least where its derivative by gamma^2 vanishes:

    -E[SE] / (2 gamma^4) + D / (2 gamma^2) = 0    <=>    gamma^2 = E[SE] / D = MSE.                             (2)

So gamma^2 need not be learned: it *is* the current mean squared error. Asperti & Trentin (2020) compute it as a running
average over minibatches. With MSE_b the mean over all elements of one batch,

    m <- decay * m + (1 - decay) * MSE_b,        gamma^2 = m.                                                   (3)

An average that starts somewhere keeps that start for long: after 30 batches at decay 0.99 three quarters of it. Divided
by the sum of its weights, as Adam divides its moments (Kingma & Ba 2015), it has none. After t batches

    m_t = (1 - decay) / (1 - decay^t) sum_{k=1..t} decay^(t-k) MSE_k.                                           (4)

At balance the quadratic term of (1) is D/2 whatever the MSE: as reconstruction improves, KL counts in proportion. No
gradient passes through gamma^2, and a step uses the value from *earlier* batches.

Taking gamma^2 from the current batch instead, detached, gives the gradient of (D/2) log MSE_b, since
grad SE / (2 MSE_b) = (D/2) grad MSE_b / MSE_b (sigma-VAE's "optimal sigma": Rybkin et al. 2021, arXiv 2006.13202).

Errors |x - x^|^p with p other than 2 belong to the generalised normal distribution, whose scale alpha obeys
alpha^p = p E|x - x^|^p. With m = E|x - x^|^p, kept by the same running average, (1) becomes

    -log p(x|z) = sum |x - x^|^p / (p m) + D [ log(2 Gamma(1 + 1/p)) + log(p m) / p ],                          (5)

which is (1) for p = 2 and the Laplace distribution for p = 1. Below, `gamma2` is m for any p.

Every loss term is one value per image, summed over its dimensions, in nats, and averaged over the batch in
`Balance.combine` and nowhere else. Where a torch.distributed process group is up, training reduces sums and counts over
its ranks, so every rank uses the same gamma2 and N ranks on shards equal one process on their union. Evaluation mode
never communicates.

In reading order: `contract` (what a balance is), `following` (gamma2 follows the error), `steering` (the balance is set,
scheduled or controlled), `named` (balances by name).
"""

from poise.balance.contract import Balance, LossTerms, negative_log_likelihood
from poise.balance.following import ComputedBalance, LearnedBalance, OptimalBalance
from poise.balance.named import make_balance
from poise.balance.steering import (
    ConstrainedBalance,
    ControlledBalance,
    FixedBalance,
    ScheduledBalance,
)

__all__ = [
    "Balance",
    "ComputedBalance",
    "ConstrainedBalance",
    "ControlledBalance",
    "FixedBalance",
    "LearnedBalance",
    "LossTerms",
    "OptimalBalance",
    "ScheduledBalance",
    "make_balance",
    "negative_log_likelihood",
]
