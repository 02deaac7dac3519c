"""Weight formats: how each is stored, packed and multiplied."""

from collections.abc import Mapping
from types import ModuleType

from lockstep.formats import q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0

BLOCK_FORMATS: Mapping[str, ModuleType] = {
    "q8_0": q8_0,
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
}
