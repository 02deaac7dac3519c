"""The llama3 rope scaling behind the factors that a GGUF file holds in its place.

Conversion divides each pair's frequency by a factor (rope_freqs.weight) and forgets what the factors were made of:
pairs that turn more than high_freq_factor times in the original context keep their frequency, those that turn less than
low_freq_factor times are slowed down by the whole factor, those between by a part of it.
Source: conversion/llama.py of llama.cpp.
"""

import math
from collections.abc import Iterator

import numpy as np

LLAMA3_CONTEXT = 8192
LOW, HIGH = 1.0, 4.0
CONTEXTS = [1 << bits for bits in range(8, 22)]
TOLERANCE = 1e-3


def llama3_scaling(theta: float, rope_dim: int, factors: np.ndarray, original: int, where: str) -> dict:
    """The parameters, as in config.json, that give these `factors`, float32 [rope_dim / 2].

    `original` is the original context to try first. Raises ValueError for factors that are not llama3's.
    """
    if factors.shape == (rope_dim // 2,) and np.isfinite(factors).all() and factors.max() >= 1:
        frequencies = np.array([theta ** (-2 * i / rope_dim) for i in range(rope_dim // 2)])
        wanted = factors.astype(np.float64)
        tried = list(_candidates(frequencies, wanted, original))
        errors = [float(np.abs(_factors(frequencies, each) / wanted - 1).max()) for each in tried]
        if min(errors) < TOLERANCE:
            return tried[int(np.argmin(errors))]
    raise ValueError(f"{where}: tensor 'rope_freqs.weight' holds factors other than llama3's, not supported")


def _candidates(frequencies: np.ndarray, wanted: np.ndarray, original: int) -> Iterator[dict]:
    """Usual parameters, the likeliest first, then those that the factors between the ends determine."""
    factor = float(wanted.max())
    for context in (original, LLAMA3_CONTEXT, *CONTEXTS):
        yield _scaling(factor, HIGH, context)
    between = np.flatnonzero((wanted > 1) & (wanted < factor))
    if len(between) >= 2:
        first, last = ((frequencies[i].item(), wanted[i].item()) for i in (between[0], between[-1]))
        yield from _solved(first, last, factor)


def _solved(first: tuple[float, float], last: tuple[float, float], factor: float) -> Iterator[dict]:
    """The parameters that give two (frequency, factor between the ends).

    turns = LOW + part (high - LOW), with turns = context frequency / 2 pi, is linear in `context` and `high`.
    """
    (a, part_a), (b, part_b) = ((f / (2 * math.pi), _part(each, factor)) for f, each in (first, last))
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


def _part(slowed: float, factor: float) -> float:
    """How much of its frequency a pair keeps: 1 all, 0 only the part that the whole factor leaves."""
    return (1 / slowed - 1 / factor) / (1 - 1 / factor)


def _factors(frequencies: np.ndarray, scaling: dict) -> np.ndarray:
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
