"""Shared by the other folders: seeds, files, locks, signals, progress, specs, kernels, version."""
