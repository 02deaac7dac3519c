"""One run over the lines of an input: asks those that have no answer yet, and writes the output in their order."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lockstep.batch.finished import Finished, custom_id_digest
from lockstep.batch.journal import Journal
from lockstep.batch.lines import Line, RawLine, error_of, raw_lines

LOOK_SECONDS = 0.05  # how often it is asked whether there is room, while no answer comes
TURN = 64  # lines that are passed by before others have their turn
Answer = tuple[bytes, bool]  # a line of the output, and whether it is a success


class InputChanged(ValueError):
    """The input has a line that nobody has asked: it was changed meanwhile."""


@dataclass
class Counts:
    """Lines of the input. total: all that are not blank; known: of these, those whose answer an earlier run has left;
    done: answered or refused so far, known ones included; failed: those of them that are errors.
    first_error: what the first of these says, where the output was written; num_like_first: how many say the same."""

    total: int = 0
    known: int = 0
    done: int = 0
    failed: int = 0
    first_error: str | None = None
    num_like_first: int = 0

    def add_written(self, output_line: bytes, failed: bool) -> None:
        """Counts a line of the output."""
        self.total, self.done, self.failed = self.total + 1, self.done + 1, self.failed + failed
        if failed:
            error = error_of(output_line)
            self.first_error = error if self.first_error is None else self.first_error
            self.num_like_first += error == self.first_error


class Work:
    """One run. source: the input, a file that can be read again; max_line_bytes: of it. reader: makes a new function
    from lines of the input to Lines, which sees all of them in order. journal, earlier: where answers are kept.
    """

    def __init__(
        self,
        source: Path,
        max_line_bytes: int,
        reader: Callable[[], Callable[[RawLine], Line]],
        journal: Journal,
        earlier: Finished | None = None,
    ) -> None:
        self._source, self._max_line_bytes, self._reader = source, max_line_bytes, reader
        self._kept: list[Journal | Finished] = [journal] if earlier is None else [journal, earlier]
        self._journal, self.counts = journal, Counts()

    def lines(self) -> Iterator[Line]:
        """Yields the input's lines."""
        read = self._reader()
        with open(self._source, "rb") as file:
            for raw in raw_lines(file, self._max_line_bytes):
                yield read(raw)

    async def ask(
        self,
        answer: Callable[[Line], Awaitable[Answer]],
        has_room: Callable[[int], bool],
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        """Asks all lines that have no answer yet, in order, many at once.

        answer: asks one; what it raises ends this. has_room: whether one more may be asked beside this number of
        others. tell: called whenever the counts have changed.
        """
        running: set[asyncio.Task[None]] = set()
        try:
            async for line in in_turns(self.lines()):
                if self._is_known(line):
                    tell()
                    continue
                while not has_room(len(running)):
                    running = await _some_end(running)
                running.add(asyncio.create_task(self._ask(line, answer, tell)))
            while running:
                running = await _some_end(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _is_known(self, line: Line) -> bool:
        is_kept = any(line.key in each for each in self._kept)
        self.counts.known += is_kept and line.refusal is None
        self.counts.done += is_kept or line.refusal is not None
        self.counts.failed += line.refusal is not None
        return is_kept or line.refusal is not None

    async def _ask(self, line: Line, answer: Callable[[Line], Awaitable[Answer]], tell: Callable[[], object]) -> None:
        output_line, is_success = await answer(line)
        self._journal.keep(line.key, output_line, is_success)
        self.counts.done += 1
        self.counts.failed += not is_success
        tell()

    def write(
        self, output: IO[bytes], errors: IO[bytes] | None = None, unasked: Callable[[Line], bytes] | None = None
    ) -> Counts:
        """Writes the output: the answers in the order of the input's lines.

        errors: where lines go that failed; None: to the output, too. unasked: makes the line of the output for a line
        that was not asked, which has failed, too; None: InputChanged is raised for one.
        """
        counts = Counts(known=self.counts.known)
        for line in self.lines():
            kept = None if line.refusal is not None else self._kept_line(line.key)
            failed = kept is None or line.key in self._journal.failed
            made = kept or line.refusal or self._unasked(line, unasked)
            counts.add_written(made, failed)
            (output if errors is None or not failed else errors).write(made + b"\n")
        return counts

    def _kept_line(self, key: bytes) -> bytes | None:
        return next((each.line(key) for each in self._kept if key in each), None)

    def _unasked(self, line: Line, unasked: Callable[[Line], bytes] | None) -> bytes:
        if unasked is not None:
            return unasked(line)
        raise InputChanged(f"{self._source}: it has changed since its lines were asked; run the same command again")


async def in_turns(lines: Iterable[Line]):
    """Yields lines, and lets others have their turn again and again."""
    for number, line in enumerate(lines):
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)
        yield line


async def _some_end(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Waits for the end of a task, or for a moment; returns the tasks that run on. Raises what one has raised."""
    if not running:
        await asyncio.sleep(LOOK_SECONDS)
        return running
    ended, running = await asyncio.wait(running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        task.result()
    return running


def count_lines(source: Path, max_line_bytes: int, kept: Iterable[bytes]) -> tuple[int, bool]:
    """The number of lines of an input, and whether one of the `kept` lines of an output is of this input, or there are
    none: one with the same custom_id."""
    known = {custom_id_digest(line) for line in kept} - {None}
    is_of_input, total = not known, 0
    with open(source, "rb") as file:
        for raw in raw_lines(file, max_line_bytes):
            total += 1
            is_of_input = is_of_input or custom_id_digest(raw.content) in known
    return total, is_of_input
