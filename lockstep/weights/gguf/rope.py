"""Recovering the parameters of llama3 rope scaling from a GGUF file, which only holds the factors made from them.

The tensor rope_freqs.weight has a factor for each rotary pair, by which its frequency is divided. Pairs that turn more
than high_freq_factor times in the original context have factor 1, pairs that turn less than low_freq_factor times the
whole factor, pairs between them a number between these.
Source: conversion/llama.py of llama.cpp.
"""

import math
from collections.abc import Iterator

import numpy as np

from lockstep.weights import decimals

LLAMA3_CONTEXT = 8192
LOW, HIGH = 1.0, 4.0
CONTEXTS = [1 << bits for bits in range(8, 22)]
TOLERANCE = 1e-3


def llama3_scaling(theta: float, rope_dim: int, factors: np.ndarray, original: int, where: str) -> dict:
    """The parameters, as in config.json, that give these `factors`, float32 [rope_dim / 2].

    original: the original context to try first. Raises ValueError for factors that are not llama3's.
    """
    if factors.shape == (rope_dim // 2,) and np.isfinite(factors).all() and factors.max() >= 1:
        frequencies = np.array([decimals.power(theta, -2 * i / rope_dim) for i in range(rope_dim // 2)])
        stored = factors.astype(np.float64)
        candidates = list(_candidates(frequencies, stored, original))
        errors = [float(np.abs(_factors(frequencies, scaling) / stored - 1).max()) for scaling in candidates]
        if min(errors) < TOLERANCE:
            return candidates[int(np.argmin(errors))]
    raise ValueError(f"{where}: tensor 'rope_freqs.weight' holds factors other than llama3's, not supported")


def _candidates(frequencies: np.ndarray, stored: np.ndarray, original: int) -> Iterator[dict]:
    """Usual parameters, the likeliest first, then parameters solved from two factors between 1 and the largest."""
    factor = float(stored.max())
    for context in (original, LLAMA3_CONTEXT, *CONTEXTS):
        yield _scaling(factor, HIGH, context)
    between = np.flatnonzero((stored > 1) & (stored < factor))
    if len(between) >= 2:
        first, last = ((frequencies[i].item(), stored[i].item()) for i in (between[0], between[-1]))
        yield from _solved(first, last, factor)


def _solved(first: tuple[float, float], last: tuple[float, float], factor: float) -> Iterator[dict]:
    """The parameters that give two pairs with factors between 1 and `factor`. first, last: (frequency, its factor).

    turns = LOW + part (high - LOW), with turns = context frequency / 2 pi, is linear in `context` and `high`.
    """
    (a, part_a), (b, part_b) = ((f / (2 * math.pi), _part(own, factor)) for f, own in (first, last))
    determinant = b * part_a - a * part_b
    if determinant:
        context = LOW * (part_a * (1 - part_b) - part_b * (1 - part_a)) / determinant
        high = LOW * (a * (1 - part_b) - b * (1 - part_a)) / determinant
        if context >= 1 and high > LOW:
            yield _scaling(factor, round(high, 4), round(context))


def _scaling(factor: float, high: float, context: int) -> dict:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def _part(own: float, factor: float) -> float:
    """Where a pair's own factor lies between 1 (which gives 1) and the whole factor (which gives 0)."""
    return (1 / own - 1 / factor) / (1 - 1 / factor)


def _factors(frequencies: np.ndarray, scaling: dict) -> np.ndarray:
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
