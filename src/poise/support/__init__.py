"""Tools that the other folders share: seeds, files, locks, progress, specs, kernels, version."""
