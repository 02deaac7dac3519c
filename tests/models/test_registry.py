"""A model is one file, named after its model_type, and besides only the registry names it."""

import contextlib
import re
from pathlib import Path

import pytest

import lockstep
from lockstep.models.registry import ARCHITECTURES, BY_MODEL_TYPE, FAMILIES, model_config
from tests.models import tiny
from tests.models.cases import CASES

PACKAGE = Path(lockstep.__file__).parent
# Not lockstep/text: tokenizers and notations of tool calls have names of their own, which some models share.
ROOMS = ("commands", "engine", "formats", "models", "native", "ops", "ptq", "runtime", "weights")
# GGUF files of Mistral name Llama's architecture, those of its vision-language models Ministral's; folders with
# Mistral's own params.json name neither; the self-check runs two families in all formats
NATIVE, CHECK = "weights/folders/mistral.py", "engine/selfcheck/check.py"
ALSO = {
    "mistral": {NATIVE, *(f"models/families/{name}.py" for name in ("llama", "ministral3"))},
    "ministral3": {NATIVE},
    "qwen3": {CHECK},
    "qwen3_moe": {CHECK},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_known_in_its_own_file_and_in_the_registry(name):
    folder = next((f"{folder}/" for folder in ("qwen", "gemma") if name.startswith(folder)), "")
    files = [path for room in ROOMS for path in (PACKAGE / room).rglob("*.py")]
    found = {path.relative_to(PACKAGE).as_posix() for path in files if f'"{name}"' in path.read_text()}
    home = f"models/families/{folder}{name}.py"
    assert (PACKAGE / home).is_file() and found <= {home, "models/registry.py"} | ALSO.get(name, set())


def test_the_table_of_families_in_the_documents_is_whole():
    """docs/models.md names each model_type, without the `_text` of text parts, and each GGUF architecture."""
    page = (PACKAGE.parent / "docs" / "models.md").read_text("utf-8")
    rows = [line.split("|") for line in page.partition("## Families")[2].partition("\n- ")[0].splitlines()]
    types, architectures = (
        {name for row in rows[3:] if len(row) > column for name in re.findall("`([^`]+)`", row[column])}
        for column in (2, 3)
    )
    assert types - {"model_type"} == {model_type.removesuffix("_text") for model_type in BY_MODEL_TYPE}
    assert architectures == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_describes_itself(name):
    family = FAMILIES[name]
    assert name in {model_type.removesuffix("_text") for model_type in family.model_types}
    assert all(BY_MODEL_TYPE[model_type] is family for model_type in family.model_types)
    if family.tiny is not None:
        assert family.read(family.tiny).model_type in family.model_types
    if family.gguf is not None:
        assert ARCHITECTURES[family.gguf.name] is family.gguf and family.gguf.model_type in BY_MODEL_TYPE


KEYS_OF_SOME = """eos_token_id is_causal layer_types per_layer_config quantization_config rope_parameters rope_scaling
partial_rotary_factor original_max_position_embeddings text_config tie_word_embeddings""".split()
STRANGE = ["x", [], [1], ["a"], [None], {}, {"a": {}}, -1, 0, 1.5, True, None, float("inf"), float("nan"), 10**30]


@pytest.mark.parametrize(
    "name", {tiny.text_part(config)["model_type"]: name for name, config in CASES.items()}.values()
)
def test_a_value_of_any_type_is_read_or_refused(name):
    """Nothing but a ValueError leaves the reader, whatever stands under a key."""
    config = tiny.text_part(CASES[name])
    for number, key in enumerate(sorted({*config, *KEYS_OF_SOME})):
        for value in STRANGE[number % 3 :: 3]:
            with contextlib.suppress(ValueError):
                model_config({**config, key: value})
