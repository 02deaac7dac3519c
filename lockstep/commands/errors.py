"""A user's mistake as one sentence."""


def sentence(error):
    """What a ValueError, an OSError or a MemoryError says, without codes and class names."""
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {error}' if str(error) else ''}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
