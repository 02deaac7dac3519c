"""The format in which a linear layer multiplies a tensor."""

from lockstep.formats import FORMATS

CHOICES = ("auto", *(name for name, format in FORMATS.items() if format.is_choice))  # of `--weights`
EXACT = {"f64": "f32"}  # stored formats without a kernel that are not multiplied in bf16, and their replacement


def compute_format(stored: str, requested: str, width: int) -> str:
    """The format in which rows of `width` weights, stored in one format, are multiplied.

    requested: one of CHOICES; "auto" keeps the stored format, if there is a kernel for it. ValueError for other names.
    """
    if requested not in CHOICES:
        raise ValueError(f"weights {requested!r}: expected one of {', '.join(CHOICES)}")
    chosen = stored if requested == "auto" else requested
    return fitting(chosen if chosen in FORMATS else EXACT.get(chosen, "bf16"), width)


def fitting(name: str, width: int) -> str:
    """A format, or the first of its fallbacks that fits rows of `width` weights."""
    format = FORMATS[name]
    while not format.fits(width) and format.fallback is not None:
        format = FORMATS[format.fallback]
    return format.name
