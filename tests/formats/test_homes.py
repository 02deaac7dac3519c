"""A format is a file: outside the folder of formats, no module names a format that nothing is converted to."""

import re
from pathlib import Path

import pytest

from lockstep import formats
from lockstep.formats import BLOCK_FORMATS

FOLDER = Path(formats.__file__).parent
OTHERS = {p: p.read_text("utf-8").lower() for p in FOLDER.parent.rglob("*.py") if FOLDER not in p.parents}

GRIDS, FILE_NAMES, FOLDERS = Path("ptq/spec.py"), Path("weights/sources/quants.py"), Path("models/families/gpt_oss.py")
PAIRS = {Path("weights/folders/mlx.py"), *(Path(f"weights/gguf/{name}.py") for name in ("file", "undo"))}
COMPRESSED = Path("weights/folders/compressed.py")
OF_ACTIVATIONS = {Path("engine/selfcheck/rounded.py"), *(Path(f"ops/rounded/grids{end}.py") for end in ("", "_cpu"))}
# where a format's name stands for something else, or for the way in which a model's folders store it
SAME_WORD = {"mxfp4": {GRIDS, FILE_NAMES, FOLDERS, *PAIRS}, "nvfp4": {GRIDS, FILE_NAMES, *OF_ACTIVATIONS, COMPRESSED}}


@pytest.mark.parametrize("name", [name for name, format in BLOCK_FORMATS.items() if format.stored.encode is None])
def test_no_other_module_names_a_format(name):
    assert len([*FOLDER.rglob(f"{name}.py")]) == 1 and len(OTHERS) > 200
    found = {path.relative_to(FOLDER.parent) for path, source in OTHERS.items() if re.search(rf"\b{name}\b", source)}
    assert found == SAME_WORD.get(name, set())
