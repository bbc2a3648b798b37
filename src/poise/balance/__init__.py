"""Balances: losses that weigh the reconstruction error of a VAE against its KL divergence.

A decoder outputs the mean x^ of a Gaussian with variance gamma^2 in each of D dimensions. The
reconstruction term of one image x is

    -log p(x|z) = SE / (2 gamma^2) + D/2 log(2 pi gamma^2),
    SE = sum over dimensions of (x - x^)^2.                                                     (1)

The loss of a VAE is the batch mean of (1) + kl_weight * KL. gamma^2 sets the balance. If gamma^2
is too large, the KL term dominates and blocks the reconstruction. If it is too small, the latent
space is never regularised.

The optimal gamma^2. For a fixed network, (1) averaged over the data has its minimum where its
derivative with respect to gamma^2 is zero:

    -E[SE] / (2 gamma^4) + D / (2 gamma^2) = 0    <=>    gamma^2 = E[SE] / D = MSE.             (2)

So gamma^2 need not be learned: it *is* the current mean squared error. Asperti & Trentin (2020)
compute it as a running average over minibatches. With MSE_b the mean over all elements of a batch,

    m <- decay * m + (1 - decay) * MSE_b,        gamma^2 = m.                                   (3)

Bias correction. The start value of a running average decays slowly: after 30 batches at decay
0.99, three quarters of it remain. Dividing by the sum of the weights removes this bias, as Adam
does for its moments (Kingma & Ba 2015). After t batches

    m_t = (1 - decay) / (1 - decay^t) sum_{k=1..t} decay^(t-k) MSE_k.                           (4)

At balance the quadratic term of (1) is D/2, whatever the MSE. As the reconstruction improves, the
weight of the KL relative to SE, 2 gamma^2, falls in proportion. No gradient passes through gamma^2,
and a step uses the value from *earlier* batches.

Optimal sigma. gamma^2 may also be the detached MSE of the current batch. The gradient is then that
of (D/2) log MSE_b, since grad SE / (2 MSE_b) = (D/2) grad MSE_b / MSE_b. This is the "optimal
sigma" of the sigma-VAE (Rybkin et al. 2021, arXiv 2006.13202).

Other errors. An error |x - x^|^p with p other than 2 belongs to the generalised normal
distribution, with a scale alpha that obeys alpha^p = p E|x - x^|^p. The same running average
computes m = E|x - x^|^p, and (1) becomes

    -log p(x|z) = sum |x - x^|^p / (p m) + D [ log(2 Gamma(1 + 1/p)) + log(p m) / p ].          (5)

For p = 2 this is (1). For p = 1 it is the Laplace distribution. In the code, `gamma2` is m for
any p.

Groups. The dimensions may fall into groups g of different noise: channels of an image, columns of a
table, kinds of error. Let E_ig be the error of image i in group g and D_ig the number of its
observed dimensions. Then (1) is a sum over groups,

    -log p(x_i|z) = sum over g of [ E_ig / (2 gamma_g^2) + D_ig/2 log(2 pi gamma_g^2) ],

and the optimal gamma_g^2 is (sum of E_ig) / (sum of D_ig). Sums and counts are averaged apart, so
that batches, ranks and images weigh by what was observed of them:

    gamma_g^2 = sum_{k=1..t} decay^(t-k) E_kg / sum_{k=1..t} decay^(t-k) D_kg                   (6)

for the sums E_kg, D_kg of batch k. With equal counts, (6) is (4). A batch without observed
dimensions of a group is left out of its sums.

Nats. A likelihood without a scale (cross-entropy, Poisson, negative binomial) is in nats already.
There is nothing to compute: it is added to the loss as `nll`. Passed as an error, it would be
divided by its own average.

Limits. The error of a batch counts at most 100 times gamma^2 in (6), so that one outlier does not
replace the average. gamma^2 is at least 1e-12 times the first error of its group.

Reduction. Every loss term is one value per image, summed over its dimensions, in nats.
`Balance.combine` averages over the batch, and nothing else does.

Distributed training. If a torch.distributed process group is initialised, training reduces sums
and counts over its ranks, or those of `process_group`. Every rank then uses the same gamma2, and N
ranks on shards equal one process on their union. Evaluation mode never communicates.

Gradient checkpointing runs a forward twice. The second run, inside backward, finds the state that
the first one used, and changes nothing.

Reading order: `contract` (base class of all balances), `inputs` (its checks and sums of errors),
`kinds` (which error: squared, absolute, of features), `table_error` (the error of a table's rows),
`following` (gamma2 follows the error), `steering` (the balance is constant, scheduled or
controlled), `named` (balances by name).
"""

from poise.balance.contract import Balance, LossTerms, negative_log_likelihood
from poise.balance.following import ComputedBalance, LearnedBalance, OptimalBalance
from poise.balance.kinds import FeatureError, PowerError
from poise.balance.named import make_balance
from poise.balance.steering import (
    ConstrainedBalance,
    ControlledBalance,
    FixedBalance,
    ScheduledBalance,
)
from poise.balance.table_error import TableError

__all__ = [
    "Balance",
    "ComputedBalance",
    "ConstrainedBalance",
    "ControlledBalance",
    "FeatureError",
    "FixedBalance",
    "LearnedBalance",
    "LossTerms",
    "OptimalBalance",
    "PowerError",
    "ScheduledBalance",
    "TableError",
    "make_balance",
    "negative_log_likelihood",
]
