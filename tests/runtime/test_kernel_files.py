"""Files of compiled code that were damaged: never an error, never what is left of the code."""

import os
import subprocess
import sys

import pytest

from lockstep.runtime.kernel_files import CheckedFiles

DAMAGES = {
    "cut off": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "another byte": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
    "zeros": lambda raw: bytes(len(raw)),
}
COMPILED = """
from lockstep.ops import BACKENDS
assert BACKENDS["cpu"]["add"].kernel.address
"""


def damage(folder, endings, how):
    paths = [path for path in folder.rglob("*") if path.name.endswith(endings)]
    assert paths
    for path in paths:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("endings", [(".nbi",), (".nbc",), (".nbi", ".nbc")], ids="".join)
def test_a_damaged_entry_is_none_and_can_be_saved_again(endings, how, tmp_path):
    files = CheckedFiles(str(tmp_path), "kernel", "stamp")
    files.save("key", {"code": bytes(range(256)) * 20})
    assert files.load("key") == {"code": bytes(range(256)) * 20} and files.load("other") is None
    damage(tmp_path, endings, how)
    assert files.load("key") is None
    files.save("key", {"code": b"again"})
    assert files.load("key") == {"code": b"again"}


def test_a_damaged_kernel_is_compiled_again(tmp_path):
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "LOCKSTEP_CACHE": str(tmp_path), "PYTHONPATH": path}
    for how in (None, "cut off"):
        if how:
            damage(tmp_path, (".nbi", ".nbc"), how)
        done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
