"""Studies of quantization: which grids for which tensors keep a model good on a target."""
