"""Downloads from the Hugging Face hub, whose client shows bars of its own, as progress like any other work."""

import io
from typing import Any

from lockstep.progress import OnProgress


def bar_class(progress: OnProgress) -> type:
    """A class of bars for the hub's client, which draw nothing and report ("downloading", bytes done, bytes in all).

    The client may have several bars that count the same bytes, as received and as written: the furthest is reported.
    """
    from tqdm.std import tqdm  # the hub's client is made for its classes

    done, total = [0], [0]

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str = "", **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            updated = super().update(n)
            if self._counts_bytes:
                done[0], total[0] = max(done[0], int(self.n)), max(total[0], int(self.total or 0))
                progress("downloading", done[0], total[0] or None)
            return updated

    return Bar
