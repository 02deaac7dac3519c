"""The model families that can be run: one line for each file in `families`."""

from collections.abc import Mapping

from lockstep.models.config import Config, text_config
from lockstep.models.families.gemma.gemma2 import GEMMA2
from lockstep.models.families.gemma.gemma3 import GEMMA3
from lockstep.models.families.gemma.gemma3n import GEMMA3N
from lockstep.models.families.gemma.gemma4 import GEMMA4
from lockstep.models.families.gpt_oss import GPT_OSS
from lockstep.models.families.granite import GRANITE
from lockstep.models.families.granitemoe import GRANITEMOE
from lockstep.models.families.llama import LLAMA
from lockstep.models.families.ministral3 import MINISTRAL3
from lockstep.models.families.mistral import MISTRAL
from lockstep.models.families.olmo2 import OLMO2
from lockstep.models.families.phi3 import PHI3
from lockstep.models.families.qwen.qwen2 import QWEN2
from lockstep.models.families.qwen.qwen2_vl import QWEN2_VL
from lockstep.models.families.qwen.qwen3 import QWEN3
from lockstep.models.families.qwen.qwen3_5 import QWEN3_5
from lockstep.models.families.qwen.qwen3_5_moe import QWEN3_5_MOE
from lockstep.models.families.qwen.qwen3_moe import QWEN3_MOE
from lockstep.models.families.qwen.qwen3_next import QWEN3_NEXT
from lockstep.models.families.qwen.qwen3_vl import QWEN3_VL
from lockstep.models.families.qwen.qwen3_vl_moe import QWEN3_VL_MOE
from lockstep.models.families.seed_oss import SEED_OSS
from lockstep.models.families.smollm3 import SMOLLM3
from lockstep.models.family import Family
from lockstep.models.model_config import ModelConfig
from lockstep.weights.brief import brief_errors
from lockstep.weights.gguf.architecture import Architecture

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen2_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "gemma3": GEMMA3,
    "gpt_oss": GPT_OSS,
    "gemma2": GEMMA2,
    "gemma4": GEMMA4,
    "gemma3n": GEMMA3N,
    "phi3": PHI3,
    "ministral3": MINISTRAL3,
    "granite": GRANITE,
    "granitemoe": GRANITEMOE,
    "seed_oss": SEED_OSS,
    "olmo2": OLMO2,
}
BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
ARCHITECTURES: Mapping[str, Architecture] = {
    name: architecture
    for family in FAMILIES.values()
    for own in (family.gguf, *family.other_gguf)
    if own is not None
    for name, architecture in own.by_name().items()
}


def family_of(model_type: object) -> Family:
    """The family of a model_type; ValueError for one that is not supported."""
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        supported = ", ".join(sorted(BY_MODEL_TYPE))
        raise ValueError(f"model_type {model_type!r} is not supported; supported are {supported}")
    return BY_MODEL_TYPE[model_type]


@brief_errors()
def model_config(config: Config) -> ModelConfig:
    """The ModelConfig of a config.json. ValueError names a key that is missing or not supported."""
    inner = text_config(config)
    model_type = inner.get("model_type") or text_type(config.get("model_type"))
    return family_of(model_type).read({**inner, "model_type": model_type})


def text_type(model_type: object) -> object:
    """The model_type of a text_config that names none, given the outer config's model_type: gemma3_text for gemma3."""
    return f"{model_type}_text" if f"{model_type}_text" in BY_MODEL_TYPE else model_type
