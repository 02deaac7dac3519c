"""The lock files: every locked package has hashes and a version that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES, EXTRAS = PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]
RUN = [*DEPENDENCIES, *PROJECT["build-system"]["requires"]]
WANTED = {
    "requirements.lock": RUN,
    "requirements-test.lock": [*RUN, *EXTRAS["test"]],
    "requirements-dev.lock": EXTRAS["dev"],
}
# the first versions without a vulnerability that was known when the floors were set
SOUND = {"jinja2": "3.1.6", "starlette": "1.3.1", "setuptools": "78.1.1", "pytest": "9.0.3"}


def locked(name):
    """{package: [(Version, number of hashes), ...]}, an entry for each environment marker."""
    text, found = (ROOT / name).read_text().replace("\\\n", " "), {}
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            package, version, rest = re.fullmatch(r"([\w.-]+)==([\w.]+)( .*)", line).groups()
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}(?= |$)", rest)
            found.setdefault(canonicalize_name(package), []).append((Version(version), len(hashes)))
    return found


@pytest.mark.parametrize("name", WANTED)
def test_locks_hold_what_the_project_asks_for_and_name_no_place(name):
    found = locked(name)
    for text in WANTED[name]:
        wanted = Requirement(text)
        assert all(version in wanted.specifier for version, _ in found[canonicalize_name(wanted.name)]), (
            f"{text}: run make lock"
        )
    assert all(count for versions in found.values() for _, count in versions)
    assert not re.search(r"://|index-url|find-links", (ROOT / name).read_text())


def test_tests_run_on_what_is_installed():
    installed, tested = locked("requirements.lock"), locked("requirements-test.lock")
    assert all(tested[name] == versions for name, versions in installed.items())


def test_no_version_with_a_known_hole_is_allowed():
    floors = {r.name: r.specifier for r in map(Requirement, [*RUN, *EXTRAS["test"]])}
    for name, sound in SOUND.items():
        [floor] = [Version(each.version) for each in floors[name] if each.operator == ">="]
        assert floor >= Version(sound), name
