"""The format in which a linear layer multiplies a tensor."""

from lockstep.formats import FORMATS

CHOICES = ("auto", *(name for name, format in FORMATS.items() if format.is_choice))  # of `--weights`
# Stored formats without a kernel, and the one in which they are multiplied: only float64 is rounded.
KERNEL_OF = {"f64": "f32", "f8_e4m3": "bf16", "f8_e5m2": "bf16"}
STORED = (*FORMATS, *KERNEL_OF)


def compute_format(stored: str, requested: str, width: int, name: str = "") -> str:
    """The format in which rows of `width` weights, stored in one format, are multiplied.

    requested: one of CHOICES; "auto" keeps the stored format, if there is a kernel for it. ValueError for other names,
    and for integers, which are no weights without their scales. name: of the tensor, for this error.
    """
    if requested not in CHOICES:
        raise ValueError(f"weights {requested!r}: expected one of {', '.join(CHOICES)}")
    if stored not in STORED:
        raise ValueError(f"tensor {name!r}: format {stored} is not supported, only {', '.join(STORED)}")
    chosen = stored if requested == "auto" else requested
    return fitting(KERNEL_OF.get(chosen, chosen), width)


def fitting(name: str, width: int) -> str:
    """A format, or the first of its fallbacks that fits rows of `width` weights."""
    format = FORMATS[name]
    while not format.fits(width) and format.fallback is not None:
        format = FORMATS[format.fallback]
    return format.name
