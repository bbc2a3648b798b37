"""What the rooms above share and a library does not give: seeds, files, locks and signals, progress, specs, kernels, version."""
