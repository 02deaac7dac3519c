"""Has pip say on which systems nothing would run, before it looks for a Numba that is not there. All else of the
package is in pyproject.toml.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import lockstep  # noqa: F401  ImportError, with a sentence, on Windows and on old macOS

if __name__ == "__main__":
    from setuptools import setup

    setup()
