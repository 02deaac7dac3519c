"""Tables of commands, in which a number or a name stays on one line. A pipe or a file gets lines as long as they are;
a terminal that is too narrow for a table gets its rows one below the other, a line for each cell."""

from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

UNWRAPPED = 1 << 16  # columns where the output is no terminal
LONGEST_WORD = 32  # characters of a word that is not broken; a longer one, such as a path, may be


def report_console(stderr: bool = False) -> Console:
    """The console for a command's report, on standard output or standard error. Off a terminal no line is wrapped."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=UNWRAPPED)


class ReportTable(Table):
    """A table with a line above it, `heading`, that may be longer than the table is wide."""

    heading: Text | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The heading, and the table in columns; or, where these do not fit, in a line for each cell."""
        if self.heading is not None:
            yield self.heading
        widths = self._widths(console, options)
        if widths is None:
            yield from self._lines()
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _widths(self, console: Console, options: ConsoleOptions) -> list[int] | None:
        """The columns' widths without padding; None where some word would have to be broken."""
        free = options.max_width - 2 * len(self.columns) - self._extra_width
        limits = [_limits(column, console) for column in self.columns]
        widths = [limit.maximum for limit in limits]
        while sum(widths) > free:
            index = max(range(len(widths)), key=lambda i: widths[i] - limits[i].minimum)
            if widths[index] == limits[index].minimum:
                return None
            widths[index] -= 1
        return widths

    def _lines(self) -> Iterator[RenderableType]:
        """A line for each cell that is not empty, with the name of its column, and an empty line after each row."""
        names = [_text(column.header) for column in self.columns]
        width = max(map(len, names))
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for name, cell in zip(names, map(_text, row), strict=True):
                if cell.plain:
                    yield Text(f"  {name.plain:{width}s}  ").append_text(cell)
            yield ""


def _text(cell: RenderableType) -> Text:
    """A cell as a Text; it is one, or a str with rich's markup."""
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))


def _limits(column: Column, console: Console) -> Measurement:
    """The least and the most characters that a column needs. Cells on the right, which are numbers, stay whole; others,
    and headers, are wrapped between words."""
    cells = [Measurement.get(console, console.options.update(width=UNWRAPPED), _text(cell)) for cell in column.cells]
    header = Measurement.get(console, console.options.update(width=UNWRAPPED), _text(column.header))
    is_whole = column.no_wrap or column.justify == "right"
    least = max((cell.maximum if is_whole else min(cell.minimum, LONGEST_WORD) for cell in cells), default=1)
    most = max((cell.maximum for cell in cells), default=1)
    return Measurement(max(least, header.minimum), max(most, header.maximum))


def made_table(title: str | None, *columns: str) -> ReportTable:
    """A ReportTable without lines between its rows; columns whose names begin with > are aligned to the right."""
    table = ReportTable(box=box.SIMPLE_HEAD)
    if title is not None:
        table.heading = Text(title, style="italic")
    for column in columns:
        table.add_column(column.strip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


def speed(per_second: float) -> str:
    """A speed in words: with a decimal, where it is small enough for that to say something."""
    return f"{per_second:.1f}" if per_second < 1000 else f"{per_second:,.0f}"
