"""Parts of `poise.VAEEstimator`, the VAE of tables.

In reading order: `columns` (numbers, categories and types of a table), `transforms` (monotone
transforms of columns), `line` (linear models, at which training starts), `scoring` (density, ELBO
and error of rows), `stopping` (early stopping on held-out rows).
"""
