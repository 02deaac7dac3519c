"""`python -m tests.replicas.faulty FD`: a replica whose memory is broken: some weights are others than in the file.

`python -m tests.replicas --broken` has one beside two sound ones, and waits until they find it.
"""

import random
from typing import Any

import numpy as np

from lockstep.loading import LoadedModel
from lockstep.replicas import worker
from tests.receipts.campaign import copied_weights

NUM_BITS = 2000
copies: dict[Any, list[np.ndarray]] = {}


class Broken(LoadedModel):
    """A model some bits of whose packed weights are flipped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        draw = random.Random(1)
        arrays = [array.reshape(-1).view(np.uint8) for each in copies.values() for array in each]
        for _ in range(NUM_BITS):
            memory = draw.choices(arrays, [array.nbytes for array in arrays])[0]
            memory[draw.randrange(memory.nbytes)] ^= np.uint8(1 << draw.randrange(6))


if __name__ == "__main__":
    with copied_weights(copies):
        vars(worker)["LoadedModel"] = Broken
        worker.main()
