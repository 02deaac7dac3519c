"""The file of recorded digests: what each probe's definitions wrote, tensor by tensor.

A probe is named "GROUP REST" or "GROUP". Probes of a group (a family) write the same tensors, whose names the file has
once, beside a line of digests for each probe; a tensor that a probe does not have is a "-" in its line.
"""

import json
import pathlib
from collections.abc import Mapping

Digests = dict[str, dict[str, str]]  # {probe: {tensor: digest}}
PATH = pathlib.Path(__file__).with_name("golden_kernels.json")
TENSORS, ABSENT = "tensors", "-"


def read(path: pathlib.Path = PATH) -> Digests:
    """All recorded digests."""
    found: Digests = {}
    for group, lines in json.loads(path.read_text()).items():
        names = lines.pop(TENSORS).split()
        for rest, line in lines.items():
            digests = zip(names, line.split(), strict=True)
            found[f"{group} {rest}".rstrip()] = {name: digest for name, digest in digests if digest != ABSENT}
    return found


def write(recorded: Mapping[str, Mapping[str, str]], path: pathlib.Path = PATH) -> None:
    """Writes the digests; probes of a group in the order in which they are given."""
    groups: dict[str, dict[str, Mapping[str, str]]] = {}
    for probe, digests in recorded.items():
        group, _, rest = probe.partition(" ")
        groups.setdefault(group, {})[rest] = digests
    path.write_text(json.dumps({group: _lines(probes) for group, probes in groups.items()}, indent=0) + "\n")


def _lines(probes: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    longest = max(probes.values(), key=len)
    for rest, digests in probes.items():
        assert digests.keys() <= longest.keys(), (rest, digests.keys() - longest.keys())
    lines = {rest: " ".join(digests.get(name, ABSENT) for name in longest) for rest, digests in probes.items()}
    return {TENSORS: " ".join(longest)} | lines
