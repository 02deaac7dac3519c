"""Post-training quantization: plans that round tensors to grids, and programs and weights that are rounded so."""
