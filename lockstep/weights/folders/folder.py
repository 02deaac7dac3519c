"""A folder's tensors, with the weights that its quantization_config says how to read."""

from collections.abc import Callable, Mapping
from typing import Any

from lockstep.formats import BLOCK_FORMATS
from lockstep.weights.folders.compressed import open_compressed
from lockstep.weights.folders.fp8 import open_fp8
from lockstep.weights.folders.gptq import open_awq, open_gptq
from lockstep.weights.folders.mlx import open_mlx
from lockstep.weights.folders.mlx_names import with_usual_names
from lockstep.weights.tensor import TensorMap

Method = Callable[[Mapping[str, Any], TensorMap], TensorMap]
METHODS: Mapping[str, Method] = {
    "compressed-tensors": open_compressed,
    "awq": open_awq,
    "gptq": open_gptq,
    "fp8": open_fp8,
}
KEYS = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's


def unquantized(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with a weight for each layer that is stored in parts.

    ValueError names the method, the key or the tensor that is not supported or does not fit.
    """
    key, found = quantization_of(config)
    if found is None:
        return with_usual_names(tensors)
    if not isinstance(found, dict):
        raise ValueError(f"config key {key!r}: expected an object, got {found!r}")
    method = found.get("quant_method")
    if method is None and "bits" in found and "group_size" in found:
        return with_usual_names(open_mlx(found, tensors))
    if isinstance(method, str) and method in BLOCK_FORMATS:
        return tensors  # blocks of a format's own, which the family reads
    if not isinstance(method, str) or method not in METHODS:
        allowed = ", ".join(METHODS)
        raise ValueError(f"config key {key!r}: quant_method {method!r} is not supported, only {allowed}, and MLX's")
    return METHODS[method](found, tensors)


def quantization_of(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key under which a config, or its text_config, says how its weights are quantized, and its value."""
    inner = config.get("text_config")
    for one in (config, inner if isinstance(inner, dict) else {}):
        for key in KEYS:
            if one.get(key) is not None:
                return key, one[key]
    return KEYS[0], None
