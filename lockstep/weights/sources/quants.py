"""Choosing one GGUF file of several by the tag of its quantization, such as Q4_K_M."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

GGUF_FILE = r"[\w./+-]+\.gguf"  # a name that can stand behind a colon
SPLIT_FILE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAX_PARTS = 1000
DEFAULT_QUANT = "q4_k_m"  # as llama.cpp and Ollama choose
QUANT = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q[1-8]\w*|bf16|f16|f32|fp16|fp32|fp8|mxfp4\w*|nvfp4\w*|tq[12]_0)(?![a-z0-9])",
    re.IGNORECASE,
)
# no models of their own: vision projectors, importance matrices, drafters
BESIDE = re.compile(r"^mtp-|(?:^|[-._])(?:mmproj|imatrix)(?:[-._]|$)", re.IGNORECASE)


def parts_of(file: str) -> list[str]:
    """The names of all parts of a split GGUF file, in order; of another file its own name. ValueError for an impossible
    number of parts."""
    split = SPLIT_FILE.fullmatch(file)
    if split is None:
        return [file]
    num_parts = int(split[3])
    if not 0 < num_parts <= MAX_PARTS:
        raise ValueError(f"{file}: expected 1 to {MAX_PARTS} parts")
    return [f"{split[1]}-{number:05d}-of-{num_parts:05d}.gguf" for number in range(1, num_parts + 1)]


def present_parts(file: str, files: Iterable[str]) -> list[str]:
    """Those of the files that are parts of a GGUF file."""
    split = SPLIT_FILE.fullmatch(file)
    if split is None:
        return [file]
    others = {other: SPLIT_FILE.fullmatch(other) for other in files}
    return [name for name, other in others.items() if other and (other[1], other[3]) == (split[1], split[3])]


def gguf_models(files: Iterable[str]) -> dict[str, str | None]:
    """{GGUF file: its quant} of the models among files; a split model is the first of its parts that is there."""
    firsts: dict[object, str] = {}
    for file in sorted(files):
        if file.endswith(".gguf") and not BESIDE.search(file.rpartition("/")[2]):
            split = SPLIT_FILE.fullmatch(file)
            firsts.setdefault((split[1], split[3]) if split else file, file)
    return {file: quant_of(file) for file in firsts.values()}


def quant_of(file: str) -> str | None:
    """The quant that a file's name ends in or contains last, or else that of its folder; None where neither has one."""
    folder, _, name = file.rpartition("/")
    for text in (_stem(name), folder):
        if found := QUANT.findall(text):
            return found[-1]
    return None


def _stem(name: str) -> str:
    split = SPLIT_FILE.fullmatch(name)
    return split[1] if split else name.removesuffix(".gguf")


def choose(files: Iterable[str], tag: str | None, name: str) -> str:
    """The GGUF file among files that has the quant `tag`, in upper or lower case; without a tag the only one, or that
    of DEFAULT_QUANT. ValueError that lists what there is, each with what to type after `name`.
    """
    models = gguf_models(files)
    if not models:
        raise ValueError(f"{name}: there is no GGUF file")
    if tag is None and len(models) == 1:
        return next(iter(models))
    matching = _matching(models, tag or DEFAULT_QUANT)
    if len(matching) == 1:
        return matching[0]
    typed = names(models)
    if matching:
        several = listed([typed[file] for file in matching], name)
        raise ValueError(f"{name}: {len(matching)} GGUF files are {tag or DEFAULT_QUANT.upper()}; expected {several}")
    wanted = f"{name}:{tag}: no GGUF file of this quant" if tag else f"{name}: GGUF files of several quants"
    raise ValueError(f"{wanted}; expected {listed([typed[file] for file in models], name)}")


def _matching(models: Mapping[str, str | None], tag: str) -> list[str]:
    """The files that have a quant; where none is called so exactly, those that are with a maker's prefix, as UD-."""
    tag = tag.lower()
    quants = {file: (quant or "").lower() for file, quant in models.items()}
    exact = [file for file, quant in quants.items() if quant == tag]
    return exact or [
        file
        for file, quant in quants.items()
        if quant.removeprefix("ud-") == tag or re.search(rf"[-._]{re.escape(tag)}$", _stem(file).lower())
    ]


def names(models: Mapping[str, str | None]) -> dict[str, str]:
    """{file: what names it among the models}: its quant, or where that is no name for it alone, the file itself."""
    counts = Counter(quant.lower() for quant in models.values() if quant)
    return {file: quant if quant and counts[quant.lower()] == 1 else file for file, quant in models.items()}


def full_name(folder: Path, file: str, repository: str, tag: str, revision: str = "") -> str:
    """What to type for a GGUF file of a repository that lies in a folder: its path, where its own name cannot be typed
    behind a colon."""
    can_be_typed = "/" in repository and (not tag.endswith(".gguf") or re.fullmatch(GGUF_FILE, tag))
    return f"{repository}:{tag}{revision}" if can_be_typed else str(folder / file)


def listed(tags: Sequence[str], name: str, most: int = 40) -> str:
    """ "name:Q4_0 or name:Q8_0": what to type for one of several."""
    shown = [f"{name}:{tag}" for tag in tags[:most]]
    more = [f"{len(tags) - most} more"] if len(tags) > most else []
    return " or ".join(filter(None, [", ".join((shown + more)[:-1]), (shown + more)[-1]]))
