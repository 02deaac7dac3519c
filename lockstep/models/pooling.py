"""How a checkpoint's makers want the hidden states of a text pooled into its embedding."""

from collections.abc import Mapping
from pathlib import Path

from lockstep.weights.mapped import read_json_object

POOLING_OF_MODE = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
UNKNOWN = "last"  # what decoders are trained for where nothing is said


def default_pooling(path: Path, config: Mapping[str, object]) -> str:
    """The pooling that a GGUF file's `config` names, or the folder's 1_Pooling/config.json of sentence-transformers.

    "last" where neither does. Raises ValueError for one that is not supported.
    """
    if config.get("pooling_type") is not None:
        return str(config["pooling_type"])
    file = path / "1_Pooling" / "config.json"
    modes = _modes(read_json_object(file)) if file.is_file() else []
    if len(modes) > 1 or not set(modes) <= POOLING_OF_MODE.keys():
        raise ValueError(f"{file}: pooling by {' and '.join(modes)} is not supported, only by mean_tokens or lasttoken")
    return POOLING_OF_MODE[modes[0]] if modes else UNKNOWN


def _modes(pooling: Mapping[str, object]) -> list[str]:
    """The modes that are on: one by its name, or switches such as pooling_mode_mean_tokens."""
    if isinstance(pooling.get("pooling_mode"), str):
        return [str(pooling["pooling_mode"])]
    return [
        name.removeprefix("pooling_mode_")
        for name, on in pooling.items()
        if name.startswith("pooling_mode_") and on is True
    ]
