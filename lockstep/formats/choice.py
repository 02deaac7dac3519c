"""In which format a linear layer multiplies a tensor."""

from lockstep.formats import FORMATS

CHOICES = ("auto", *(name for name, format in FORMATS.items() if format.is_choice))  # of `--weights`
EXACT = {"f64": "f32"}  # stored formats that are multiplied in another than bf16, though there is no kernel for them


def compute_format(stored: str, requested: str, width: int) -> str:
    """The format in which rows of `width` weights, stored in one format, are multiplied.

    requested: one of CHOICES; "auto" keeps what is stored, if there is a kernel for it. ValueError for any other.
    """
    if requested not in CHOICES:
        raise ValueError(f"weights {requested!r}: expected one of {', '.join(CHOICES)}")
    chosen = stored if requested == "auto" else requested
    return fitting(chosen if chosen in FORMATS else EXACT.get(chosen, "bf16"), width)


def fitting(name: str, width: int) -> str:
    """A format, or the nearest of its fallbacks that has kernels for rows of so many weights."""
    format = FORMATS[name]
    while not format.fits(width) and format.fallback is not None:
        format = FORMATS[format.fallback]
    return format.name
