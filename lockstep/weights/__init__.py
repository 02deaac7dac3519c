"""Weights: from checkpoint files to the packed arrays that kernels read."""
