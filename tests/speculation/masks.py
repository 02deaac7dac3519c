"""A SpeculativeMask for models without a tokenizer."""

from collections.abc import Iterator, Sequence

import numpy as np

from lockstep.text.speculative_mask import SpeculativeMask


class FewAfterEach(SpeculativeMask):
    """After each token one to three tokens are allowed, which depend on it; a single one is forced."""

    def __init__(self, vocab_size: int, num_samples: int = 1) -> None:
        self._vocab_size = vocab_size

    def _options(self, last: int) -> list[int]:
        return [(5 * last + 7 * k + 3) % self._vocab_size for k in range(1 + last % 3)]

    def _mask(self, text: Sequence[int]) -> np.ndarray:
        bits = np.zeros(-(-self._vocab_size // 32) * 32, bool)
        bits[self._options(text[-1] if text else 0)] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        return self._mask(output_ids)

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        text = [*output_ids, *drafts]
        num_rows = self.num_allowed(output_ids, drafts) + 1
        return (self._mask(text[: len(output_ids) + i]) for i in range(first, num_rows))

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        last, made = [0, *output_ids, *drafts][-1], []
        while len(options := self._options(last)) == 1 and len(made) < 5:
            made += options
            last = options[0]
        return made

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        pairs = zip([[0, *output_ids][-1], *drafts], drafts, strict=False)
        return next((i for i, (last, token) in enumerate(pairs) if token not in self._options(last)), len(drafts))
