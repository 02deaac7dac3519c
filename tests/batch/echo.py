"""A batch without a model: its lines are answered by themselves, after a moment. Run as a program, it can be killed."""

import asyncio
import sys
from contextlib import closing
from pathlib import Path

from lockstep.batch.finished import Finished
from lockstep.batch.journal import Journal, journal_path
from lockstep.batch.lines import Line, RawLine, line_key, response_line
from lockstep.batch.work import Work

MAX_BYTES = 100


def read(raw: RawLine) -> Line:
    """A line as a request; one that begins with ! is refused, and one that begins with ? will fail."""
    key = line_key(b"", raw.digest)
    if raw.is_too_long or raw.content.startswith(b"!"):
        return Line(key, response_line(key, None, 400, b'"refused"'))
    return Line(key, None, raw.content.decode(), "/", raw.content)


class Echo:
    """Answers lines. asked: how many, so far; seconds: that an answer takes, longer for earlier lines."""

    def __init__(self, seconds=0.0):
        self.asked, self._seconds = 0, seconds

    async def __call__(self, line):
        self.asked += 1
        await asyncio.sleep(self._seconds / self.asked**0.5)
        status = 500 if line.body.startswith(b"?") else 200
        return response_line(line.key, line.custom_id, status, b'"%b"' % line.body.upper()), status == 200


def answer(source: Path, output: Path, echo):
    """Runs a batch; returns its counts."""
    with closing(Journal(journal_path(output))) as journal, closing(Finished(output)) as earlier:
        journal.tell(size=1)
        work = Work(source, MAX_BYTES, lambda: read, journal, earlier)
        asyncio.run(work.ask(echo, lambda num_running: num_running < 8))
        with open(made := output.with_suffix(".new"), "wb") as file:
            counts = work.write(file)
        made.replace(output)
        journal.remove()
        return counts


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]), Echo(float(sys.argv[3])))
