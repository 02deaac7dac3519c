"""The merges of a BPE vocabulary that gives only the rank of each token, such as tiktoken's, or SentencePiece's scores.

Such a tokenizer joins, again and again, the two neighbours whose joined text is the token of the lowest rank, the
leftmost of equals. A text between two neighbours' borders is then joined as if it stood alone: whatever was joined
inside of it was the best there, too. So a token can come out of one pair only, the last one that is joined when its own
text is tokenized, and a list of these pairs gives the same tokens as the ranks. Listing every pair that makes a token,
as conversions do, would not: ab + a and a + ba both make aba.
"""

import itertools
import math
from collections.abc import Mapping

MAX_WORK = 1 << 27  # the squares of all tokens' lengths, added up; a real vocabulary of 131072 tokens has 9 million


def merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pair that makes each token of `ranks`, the token of the lowest rank first. One that is never made has none.

    Joining begins with single characters. A list cannot say that of tokens of equal rank the leftmost pair is joined:
    here the longest of them is first. For runs of one character, such as the spaces of Llama's vocabularies, this
    comes to the same. ValueError for tokens that are too long to be looked through.
    """
    work = sum(len(token) ** 2 for token in ranks)
    if work > MAX_WORK:
        raise ValueError(f"the squares of its tokens' lengths are {work} together, at most {MAX_WORK} are allowed")
    order = sorted(ranks, key=lambda token: (ranks[token], -len(token)))
    pairs = (_last_pair(token, ranks) for token in order)
    return [pair for pair in pairs if pair is not None]


def _last_pair(token: str, ranks: Mapping[str, float]) -> tuple[str, str] | None:
    """The last two neighbours that are joined when a token's own text is tokenized; None if more than two are left."""
    parts = list(token)
    joined = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
    while len(parts) > 2:
        best = min(joined)
        if best == math.inf:
            return None
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        for changed in (at - 1, at):
            if 0 <= changed < len(joined):
                joined[changed] = ranks.get(parts[changed] + parts[changed + 1], math.inf)
    return (parts[0], parts[1]) if len(parts) == 2 else None
