"""Figures of a window and of a text, from scores of tokens. Sums are exact, so that their order does not matter."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.ops.sampling.score import DELTA_P, KL, NLL, SAME_TOP, TOP, TOP_LOGPROB
from lockstep.study.scoring.text import NO_TARGET, Window
from lockstep.weights import decimals

INTERVAL = 1.96  # standard errors on either side of a mean: 95 % of a normal distribution
OWN = [NLL, TOP, TOP_LOGPROB]  # columns of scores that need no base model; NLL is the first of them, too
TAIL = 0.99  # the quantile of KL that is reported beside the mean and the largest


def window_figures(scores: np.ndarray, window: Window, has_base: bool) -> dict[str, Any]:
    """What is kept of a window's scores, float32 [tokens, NUM_SCORES], as values that JSON can hold.

    tokens: how many were scored. nll, nll_squares: sums over these tokens. digest: SHA-256 of all scores. With a base
    also kl: of each token, base64 of float32; same_top: in how many tokens the likeliest token is the same; delta_p: a
    sum. ValueError for scores that are not finite.
    """
    scores = scores if has_base else scores[:, OWN]  # other columns compare with the base of an earlier window
    rows = scores[np.array(window.targets) != NO_TARGET]
    unscored = int((~np.isfinite(rows).all(1)).sum())
    if unscored:
        raise ValueError(f"{unscored} of {len(rows)} tokens have no score: logits are NaN or infinite")
    nll = rows[:, NLL].astype(np.float64)
    made = dict(
        tokens=len(rows),
        nll=math.fsum(nll),
        nll_squares=math.fsum(nll * nll),
        digest=hashlib.sha256(scores.tobytes()).hexdigest(),
    )
    if has_base:
        made |= dict(
            kl=base64.b64encode(rows[:, KL].astype("<f4").tobytes()).decode(),
            same_top=int(rows[:, SAME_TOP].sum()),
            delta_p=math.fsum(rows[:, DELTA_P].astype(np.float64)),
        )
    return made


def kl_of(window: dict[str, Any]) -> np.ndarray:
    """KL of each scored token of a window, float32."""
    return np.frombuffer(base64.b64decode(window["kl"]), "<f4")


def nll_of(window: dict[str, Any]) -> float:
    """The mean negative log-likelihood of a window's tokens."""
    return window["nll"] / window["tokens"]


# ------------------------------------------------------------ of a text


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None for a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    differences = [x - mean for x in values]
    return mean, math.sqrt(math.fsum(x * x for x in differences) / (n - 1) / n)


def text_figures(windows: Sequence[dict[str, Any]], by_token: bool = False) -> dict[str, Any]:
    """tokens, nll (mean over tokens), nll_error, ppl (perplexity) and ppl_error; errors are None for a single window.

    Errors assume that windows are independent; by_token: that tokens are, as llama-perplexity does, which gives too
    small an error where neighbouring tokens are alike.
    """
    tokens = sum(w["tokens"] for w in windows)
    if not tokens:
        raise ValueError("no token of the windows is scored; expected longer windows")
    nll = math.fsum(w["nll"] for w in windows) / tokens
    error = mean_and_error([nll_of(w) for w in windows])[1]
    if by_token:
        spread = math.fsum(w["nll_squares"] for w in windows) / tokens - nll * nll
        error = math.sqrt(max(spread, 0.0) / (tokens - 1)) if tokens > 1 else None
    ppl = decimals.exp(nll)
    return dict(tokens=tokens, nll=nll, nll_error=error, ppl=ppl, ppl_error=None if error is None else ppl * error)


def compared_figures(windows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures against the float model on the same windows.

    delta_nll: mean of the windows' differences; delta_error: its standard error; delta_low, delta_high: its 95 %
    interval (normal distribution); these three are None for a single window. kl_mean, kl_p99, kl_max; top1: the share
    of tokens whose likeliest next token is the same; delta_p: the mean change of the target's probability.
    """
    tokens = sum(w["tokens"] for w in windows)
    delta, error = mean_and_error([nll_of(w) - nll_of(b) for w, b in zip(windows, base, strict=True)])
    kl = np.sort(np.concatenate([kl_of(w) for w in windows]))
    return dict(
        delta_nll=delta,
        delta_error=error,
        delta_low=None if error is None else delta - INTERVAL * error,
        delta_high=None if error is None else delta + INTERVAL * error,
        kl_mean=math.fsum(kl.astype(np.float64)) / tokens,
        kl_p99=float(kl[math.ceil(TAIL * tokens) - 1]),
        kl_max=float(kl[-1]),
        top1=sum(w["same_top"] for w in windows) / tokens,
        delta_p=math.fsum(w["delta_p"] for w in windows) / tokens,
    )
