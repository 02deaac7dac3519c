"""Quantized folders, written from their documented layouts code by code; no code is shared with the readers.

Each writer takes (rng, N, K) and returns ({suffix: array}, the weights float32 [N, K] that they stand for).
"""

import ml_dtypes
import numpy as np

from tests.models import tiny
from tests.weights.files import write_folder

GROUP = 64
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def made_up(rng, N, K, bits, group, dtype=np.float16):
    """Codes, scales and zero points of every weight's group."""
    codes = rng.integers(0, 1 << bits, (N, K))
    scales = (rng.uniform(0.5, 2, (N, K // group)) * 2.0**-bits).astype(dtype)
    zeros = rng.integers(1 << bits - 1, (1 << bits - 1) + 2, (N, K // group))
    return codes, scales, zeros


def weights(codes, scales, zeros, group):
    """(code - zero) * scale, in float32, where both factors are exact."""
    wide = lambda values: np.repeat(values, group, axis=1).astype(np.float32)
    return (codes.astype(np.float32) - wide(zeros)) * wide(scales)


def bit_stream(codes, bits):
    """Codes of each row in words of 32 bits, code k at bit k * bits, through Python's integers."""
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << bits * k for k, code in enumerate(row))
        rows.append([number >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return np.array(rows, np.uint32)


def awq(rng, N, K):
    codes, scales, zeros = made_up(rng, N, K, 4, GROUP)

    def packed(values):  # [rows, columns], eight columns a word
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
        for column in range(values.shape[1]):
            words[:, column // 8] |= values[:, column].astype(np.int64) << 4 * AWQ_ORDER[column % 8]
        return words.astype(np.uint32).view(np.int32)

    parts = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    return parts, weights(codes, scales, zeros, GROUP)


def gptq(bits, group=GROUP, more=1):
    """A writer of GPTQ layers. more: what readers add to zero points."""

    def write(rng, N, K):
        codes, scales, zeros = made_up(rng, N, K, bits, group)
        words = np.ascontiguousarray(bit_stream(codes, bits).T).view(np.int32)
        parts = {"qweight": words, "qzeros": bit_stream((zeros - more).T, bits).view(np.int32)}
        parts |= {"scales": np.ascontiguousarray(scales.T), "g_idx": (np.arange(K) // group).astype(np.int32)}
        return parts, weights(codes, scales, zeros, group)

    return write


def reordered(write, suffix, group=GROUP, shared=False):
    """A writer of 4 bits whose columns are in any order: the groups that `write` gives to runs of columns lie
    scattered. shared: in the same order in all layers of one width."""

    def write_reordered(rng, N, K):
        parts, weights = write(rng, N, K)
        order = (np.random.default_rng(K) if shared else rng).permutation(K)  # of the columns of `write`
        axis, words = (0, "qweight") if suffix == "g_idx" else (1, "weight_packed")
        codes = np.ascontiguousarray(np.moveaxis(parts[words], axis, 1)).view(np.uint32)
        each = codes[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        packed = bit_stream(each.reshape(N, K)[:, order], 4).view(np.int32)
        changed = {words: np.ascontiguousarray(np.moveaxis(packed, 1, axis)), suffix: (order // group).astype(np.int32)}
        return parts | changed, weights[:, order]

    return write_reordered


def pack_quantized(bits, group, symmetric):
    """A writer of pack-quantized layers. group: None for one of the whole row."""

    def write(rng, N, K):
        codes, scales, zeros = made_up(rng, N, K, bits, group or K, ml_dtypes.bfloat16)
        parts = {"weight_packed": bit_stream(codes, bits).view(np.int32), "weight_scale": scales}
        parts["weight_shape"] = np.array([N, K], np.int64)
        if symmetric:
            zeros[:] = 1 << bits - 1
        else:
            parts["weight_zero_point"] = np.ascontiguousarray(bit_stream(zeros.T, bits).T).view(np.int32)
        return parts, weights(codes, scales, zeros, group or K)

    return write


def int_quantized(rng, N, K):
    numbers, scales = rng.integers(-128, 128, (N, K)).astype(np.int8), rng.uniform(0.5, 2, (N, 1)) * 2.0**-8
    scales = scales.astype(ml_dtypes.bfloat16)
    return {"weight": numbers, "weight_scale": scales}, weights(numbers, scales, np.zeros((N, 1)), K)


def int_reordered(rng, N, K):
    """Integers in groups whose columns are in any order."""
    numbers, scales = rng.integers(-128, 128, (N, K)).astype(np.int8), rng.uniform(0.5, 2, (N, K // GROUP)) * 2.0**-8
    scales, order = scales.astype(ml_dtypes.bfloat16), rng.permutation(K)
    parts = {"weight": numbers[:, order], "weight_scale": scales, "weight_g_idx": order // GROUP}
    return parts, weights(numbers, scales, np.zeros((N, K // GROUP)), GROUP)[:, order]


def nvfp4(rng, N, K):
    numbers, scales = rng.integers(0, 16, (N, K)), rng.uniform(1, 400, (N, K // 16)).astype(ml_dtypes.float8_e4m3fn)
    whole = rng.uniform(9000, 30000, 1).astype(np.float32)
    floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)[numbers]
    parts = {"weight_packed": (numbers[:, ::2] | numbers[:, 1::2] << 4).astype(np.uint8), "weight_scale": scales}
    parts |= {"weight_global_scale": whole, "input_global_scale": np.ones(1, np.float32)}
    return parts, floats * np.repeat(scales.astype(np.float32) / whole, 16, axis=1)


def mlx(bits, group=GROUP):
    """A writer of MLX layers."""

    def write(rng, N, K):
        codes, scales, zeros = made_up(rng, N, K, bits, group, ml_dtypes.bfloat16)
        biases = (-scales.astype(np.float32) * zeros * rng.uniform(0.8, 1.2)).astype(ml_dtypes.bfloat16)
        wide = lambda values: np.repeat(values.astype(np.float32), group, axis=1)
        parts = {"weight": bit_stream(codes, bits), "scales": scales, "biases": biases}
        return parts, wide(scales) * codes.astype(np.float32) + wide(biases)

    return write


def fp8(block):
    """A writer of 8-bit floats. block: rows and columns that share a scale; None: all of them."""

    def write(rng, N, K):
        numbers = rng.standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn)
        if block is None:
            scale = np.float32(0.013)
            return {"weight": numbers, "weight_scale": np.array(scale)}, rounded(numbers.astype(np.float32) * scale)
        scales = rng.uniform(0.01, 0.02, (-(-N // block[0]), -(-K // block[1]))).astype(np.float32)
        products = np.array(
            [[numbers[n, k] * scales[n // block[0], k // block[1]] for k in range(K)] for n in range(N)]
        )
        return {"weight": numbers, "weight_scale_inv": scales}, rounded(products.astype(np.float32))

    return write


def rounded(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def scheme(bits, group=None, symmetric=True, **more):
    """A config_group of compressed-tensors."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy},
    } | more


def compressed(*schemes, format="pack-quantized"):
    """A quantization_config of compressed-tensors."""
    groups = {f"group_{i}": one for i, one in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
MLX = {"bits": 4, "group_size": GROUP, "mode": "affine"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"}
DYNAMIC = {"input_activations": {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}}
FLOATS = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
FOUR_BITS = compressed({"weights": FLOATS}, format="nvfp4-pack-quantized")
# name: (quantization_config, writer, format of the weights: bits of integers in groups, or its name)
FORMS = {
    "awq": (AWQ, awq, 4),
    "gptq": (GPTQ, gptq(4), 4),
    "gptq in order of activations": (GPTQ | {"desc_act": True}, reordered(gptq(4), "g_idx"), 4),
    "gptq in one order": (GPTQ | {"desc_act": True}, reordered(gptq(4), "g_idx", shared=True), 4),
    "gptq of groups of 32": (GPTQ | {"group_size": 32}, gptq(4, 32), 8),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, gptq(8), 8),
    "gptq_v2 of 2 bits": (GPTQ | {"bits": 2, "checkpoint_format": "gptq_v2"}, gptq(2, more=0), 4),
    "packed": (compressed(scheme(4, GROUP)), pack_quantized(4, GROUP, True), 4),
    "packed with zero points": (compressed(scheme(4, GROUP, False)), pack_quantized(4, GROUP, False), 4),
    "packed in order of activations": (
        compressed(scheme(4, GROUP)),
        reordered(pack_quantized(4, GROUP, True), "weight_g_idx"),
        4,
    ),
    "packed by channel": (compressed(scheme(8), scheme(4)), pack_quantized(4, None, True), 4),
    "packed by channel, zero points": (compressed(scheme(8, None, False)), pack_quantized(8, None, False), 8),
    "int": (compressed(scheme(8, **DYNAMIC), format="int-quantized"), int_quantized, "channel8"),
    "packed by channel, 8 bits": (compressed(scheme(8)), pack_quantized(8, None, True), "channel8"),
    "int in order of activations": (compressed(scheme(8, GROUP), format="int-quantized"), int_reordered, 8),
    "mlx": (MLX, mlx(4), 4),
    "mlx of 8 bits": (MLX | {"bits": 8}, mlx(8), 8),
    "mlx of 3 bits": (MLX | {"bits": 3}, mlx(3), 4),
    "mlx of 6 bits": (MLX | {"bits": 6, "group_size": 32}, mlx(6, 32), 8),
    "nvfp4": (FOUR_BITS, nvfp4, "nvfp4_scaled"),
    "fp8": (FP8, fp8((32, 48)), "bf16"),
    "fp8, one scale": (FP8 | {"weight_block_size": None, "activation_scheme": "static"}, fp8(None), "bf16"),
}


def quantized_model(form, config, folder, seed=1):
    """Two folders of one random model: quantized, and with the weights that this stands for."""
    settings, write_parts, _ = FORMS[form]
    rng, plain, parts = np.random.default_rng(seed), {}, {}
    for name, values in tiny.tensors(config, 5).items():
        layers = name.endswith("_proj.weight") or (form.startswith("mlx") and ("embed" in name or "head" in name))
        if layers:
            pieces, plain[name] = write_parts(rng, *values.shape)
            parts |= {f"{name.removesuffix('weight')}{suffix}": piece for suffix, piece in pieces.items()}
        else:
            plain[name] = parts[name] = values
    key = "quantization_config" if "quant_method" in settings else "quantization"
    write_folder(folder / "quantized", parts, **{**config, key: settings})
    write_folder(folder / "twin", plain, **config)
    return folder / "quantized", folder / "twin"
