"""Beyond which a figure is a finding: what the rules and the words for a healthy model share."""

IMBALANCED = 1.5  # equivalent beta read from the loss; computed, learned and optimal balances: 0.9 to 1.1
INFERRED_IMBALANCED = 2.0  # equivalent beta inferred from the model; balanced models: 0.65 to 1.6
OVERFITTED = 2.0  # MSE of new over training images: gamma2, right for these, is then as wrong for new ones as an imbalance;
# 8x8 digits: 1.1 after 1,500 steps on 1,500 images, 1.6 after the recipe's 3,200, 10 with 100 images, 700 with 20
GAP = 0.1  # distance of samples less that of reconstructions, share of variance; healthy 8x8 digits: 0.08, with KL x 0.1: 0.21
CLOSED = 0.5  # share of that gap that another prior must close
UNDERFITTED = 1.5  # MSE over that of the best linear VAE; trained ones, digits and Fashion-MNIST: 0.3 to 1.0
STILL_FALLING = 0.05  # of an MSE from about 70 % of training to its last tenth, as a share of the variance of what is learned;
# the digits' recipe 0.01 in stage 1 and 0.03 in stage 2; a second stage on its way from 1.2 to 0.7 has 0.1
OUT_OF_REACH = 0.5  # share of the squared error: with more, no training can mend it; a sigmoid that misses 1 by little has 1e-3
LARGE_VALUES = 5.0  # of images: standardised ones stay within, bytes do not
LARGE_LOGVAR = 20.0  # posteriors of a variance of e^20 are none; on 8x8 digits, trained ones stay below 0.3
SURE = 2.0  # standard errors by which two MSEs must differ


def white(most: float) -> float:
    """What to divide images by: 255 for bytes, whose greatest value may be missing."""
    return 255.0 if 128 < most <= 255 else most
