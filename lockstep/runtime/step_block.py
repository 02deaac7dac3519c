"""What one step is made of: the words that say which tokens of which requests a step computes.

A step is a ragged batch: the tokens of several requests laid end to end. Request s owns rows
`query_start[s] .. query_start[s + 1]`, the last tokens of a sequence of `context_len[s]` tokens (this step's included).
Nothing else is prepared on the host: which tile works on which rows and pages is found inside the kernels.
"""

import functools
from typing import Any

import numpy as np

from lockstep.runtime.words import Readable, Word, evaluated


class StepBlock(metaclass=Readable):
    """Counts, and addresses of arrays with their shapes in terms of the counts; all int32, but for `sampling`.

    T tokens, S requests, O rows with an output, R of them that are sampled, E that are embedded; W groups of pages, in
    which a request has a page table each; P pages in such a table.
    """

    num_tokens = "T"
    num_requests = "S"
    num_sampled = "R"
    token_ids = ("T",)
    query_start = ("S + 1",)
    context_len = ("S",)
    # page page_table[s W + w, p] of group w holds positions 64 p .. 64 (p + 1) of request s; where a group's layers see
    # only a window of keys, there are no pages before the window, and their entries are not read
    page_table = ("S * W", "P")
    pages_per_request = "P"  # in one group
    num_page_groups = "W"
    state_slot = ("S",)  # row of each recurrent-state array that belongs to the request
    sampled_row = ("R",)  # output rows that reach the last norm and the head
    position = ("T",)  # of each token in its sequence
    request = ("T",)  # which request of the step each token belongs to
    sampling = ("R",)  # records, see SAMPLING_RECORD in ops/sampling/sample.py
    num_embedded = "E"
    embedded_row = ("E",)  # output rows whose last hidden state is wanted for itself
    num_outputs = "O"
    output_row = ("O",)  # rows of the step that are sampled or embedded
    num_drafts = ("S",)  # how many of each request's last rows are drafts, which may have to be forgotten
    num_pending = ("S",)  # how many of each request's drafts in its last step were right and are to be absorbed now

    @classmethod
    @functools.cache
    def words(cls) -> tuple[Word, ...]:
        """Counts are integers, arrays addresses."""
        fields = {
            name: value for name, value in vars(cls).items() if isinstance(value, (str, tuple)) and name[0] != "_"
        }
        return tuple(Word(n, "int" if isinstance(v, str) else "address", i) for i, (n, v) in enumerate(fields.items()))

    @classmethod
    @functools.cache
    def indices(cls) -> dict[str, int]:
        """{name: number of its word} of all fields."""
        return {word.name: word.index for word in cls.words()}

    @classmethod
    @functools.cache
    def numbers(cls) -> dict[str, int]:
        """{name: number of its word} of the fields that are counts."""
        return {word.name: word.index for word in cls.words() if word.kind == "int"}

    @classmethod
    def index(cls, name: str) -> int:
        """The number of a field's word; ValueError for an unknown name."""
        if name not in cls.indices():
            raise ValueError(f"StepBlock: there is no field {name!r}; it has {', '.join(cls.indices())}")
        return cls.indices()[name]

    @classmethod
    def counts(cls) -> dict[str, int]:
        """{letter: number of the word that counts it}."""
        return {getattr(cls, word.name): word.index for word in cls.words() if word.kind == "int"}

    @classmethod
    def shapes(cls, **counts: int) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all arrays. counts: a number for each letter."""
        arrays = [word.name for word in cls.words() if word.kind == "address"]
        return {name: evaluated(", ".join(getattr(cls, name)), counts) for name in arrays}

    @classmethod
    def made(cls, **fields: Any) -> np.ndarray:
        """A new block, int64[STEP_WORDS], with some fields set; the others are 0."""
        block = np.zeros(len(cls.words()), np.int64)
        cls.write(block, **fields)
        return block

    @classmethod
    def write(cls, block: np.ndarray, **fields: Any) -> None:
        """Sets fields of a block: counts, and arrays, which the caller keeps alive. ValueError for anything else."""
        numbers = cls.numbers()
        for name, value in fields.items():
            if name not in numbers:
                index = cls.index(name)
                block[index] = cls._address(name, value)
                continue
            if (type(value) is not int and not isinstance(value, np.integer)) or not 0 <= value < 1 << 31:
                raise ValueError(f"StepBlock: {name} is {value!r:.80}, expected an integer from 0 to 2**31 - 1")
            block[numbers[name]] = value

    @classmethod
    def _address(cls, name: str, array: Any) -> int:
        """The address of a field's array; ValueError for an array that the field cannot be."""
        rank, is_records = len(getattr(cls, name)), name == "sampling"
        if not isinstance(array, np.ndarray) or array.ndim != rank or not array.flags.c_contiguous:
            found = f"shape {array.shape}" if isinstance(array, np.ndarray) else f"{array!r:.80}"
            raise ValueError(f"StepBlock: {name} is {found}, expected a contiguous array of rank {rank}")
        if array.dtype.names is None if is_records else array.dtype != np.int32:
            raise ValueError(f"StepBlock: {name} is {array.dtype}, expected {'records' if is_records else 'int32'}")
        return array.ctypes.data


STEP_WORDS = len(StepBlock.words())
