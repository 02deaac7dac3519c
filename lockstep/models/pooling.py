"""The pooling of hidden states into a text's embedding that a checkpoint names."""

from collections.abc import Mapping
from pathlib import Path

from lockstep.weights.mapped import read_json_object

POOLING_OF_MODE = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
DEFAULT = "last"  # what embedding models that are decoders are usually trained with


def default_pooling(path: Path, config: Mapping[str, object]) -> str:
    """The pooling that a GGUF file's `config` names, or the folder's 1_Pooling/config.json of sentence-transformers.

    DEFAULT where neither names one. Raises ValueError for a pooling that is not supported.
    """
    if config.get("pooling_type") is not None:
        return str(config["pooling_type"])
    file = path / "1_Pooling" / "config.json"
    modes = _modes(read_json_object(file)) if file.is_file() else []
    if len(modes) > 1 or not set(modes) <= POOLING_OF_MODE.keys():
        raise ValueError(f"{file}: pooling by {' and '.join(modes)} is not supported, only by mean_tokens or lasttoken")
    return POOLING_OF_MODE[modes[0]] if modes else DEFAULT


def _modes(pooling: Mapping[str, object]) -> list[str]:
    """The modes that are on: pooling_mode names one, or switches such as pooling_mode_mean_tokens are true."""
    if isinstance(pooling.get("pooling_mode"), str):
        return [str(pooling["pooling_mode"])]
    return [
        name.removeprefix("pooling_mode_")
        for name, on in pooling.items()
        if name.startswith("pooling_mode_") and on is True
    ]
