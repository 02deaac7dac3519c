"""The lines of the output for lines of a batch that was cancelled, or took too long, before they were asked."""

from collections.abc import Callable

from lockstep.batch.lines import Line, error_line

REASONS = dict(
    cancelled="the batch was cancelled before this line was answered",
    expired="the batch did not come to its end within its window",
)


def unasked(end: str) -> Callable[[Line], bytes]:
    """A function that makes the line of the output for a line that was not asked. end: "cancelled" or "expired"."""
    error = dict(code=f"batch_{end}", message=REASONS[end])
    return lambda line: error_line(line.key, line.custom_id, error)
