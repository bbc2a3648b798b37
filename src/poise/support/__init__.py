"""What the other rooms share: seeds, files, locks and signals, progress, specs, kernels, version."""
