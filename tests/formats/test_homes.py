"""A format is a file: outside the folder of formats, no module names a format that nothing is converted to."""

import re
from pathlib import Path

import pytest

from lockstep import formats
from lockstep.formats import BLOCK_FORMATS

FOLDER = Path(formats.__file__).parent
OTHERS = {p: p.read_text("utf-8").lower() for p in FOLDER.parent.rglob("*.py") if FOLDER not in p.parents}


@pytest.mark.parametrize("name", [name for name, format in BLOCK_FORMATS.items() if format.stored.encode is None])
def test_no_other_module_names_a_format(name):
    assert (FOLDER / f"{name}.py").is_file() and len(OTHERS) > 200
    assert not [str(path) for path, source in OTHERS.items() if re.search(rf"\b{name}\b", source)]
