"""`Keys`: typed access to the metadata keys of one architecture in a GGUF file.

Every key must be understood: a key that is neither read nor known to be harmless is an error, because it might change
the arithmetic.
"""

from collections.abc import Collection, Mapping

import numpy as np

MAX_FLOAT32 = 3.4e38
MAX_VALUES = 4096  # of an array with a number for each layer
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_feed_forward_length"}
# Keys of images, which Ollama has in the same file as those of text, and of positions that are equal in all text.
HARMLESS |= {"image_token_id", "vision_start_token_id", "vision_end_token_id"}
HARMLESS |= {"mrope_sections", "rope.mrope_section", "rope.mrope_interleaved"}
VISION = "vision."
# Values that change nothing: a key with this value need not be read.
USUAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "nextn_predict_layers": 0,
    "attn_logit_softcapping": 0,  # 0 is no cap, also in the next two
    "final_logit_softcapping": 0,
    "attention.clamp_kqv": 0,
}


class Keys:
    """Metadata keys of one architecture, without its prefix; remembers which were read. varying: those that may differ
    between layers."""

    def __init__(
        self,
        metadata: Mapping[str, object],
        architecture: str,
        where: str,
        varying: Collection[str] = (),
    ):
        self._metadata, self._where, self._varying = metadata, where, varying
        self._prefix = f"{architecture}."
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._metadata

    def integer(self, key: str, default: int | None = None, but: int | None = None) -> int:
        """An integer of at least 0; for a per-layer array, the value all layers share, or all but those with `but`, or
        that of the first layer where they may differ."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray):
            value = self._shared(key, value[value != but] if (value != but).any() else value)
        if type(value) is not int or value < 0 or value > 1 << 40:
            raise ValueError(f"{self._where}: {self._prefix}{key} must be a whole number, found {value!r}")
        return value

    def per_layer(self, key: str, num_layers: int) -> list[int]:
        """An integer of at least 0 for each layer."""
        if not self.is_array(key):
            return [self.integer(key)] * num_layers
        values = self.values(key) or []
        if len(values) != num_layers or any(type(n) is not int or not 0 <= n <= 1 << 40 for n in values):
            found = f"{len(values)} numbers, {values!r:.80}"
            raise ValueError(f"{self._where}: {self._prefix}{key}: expected {num_layers} whole numbers, found {found}")
        return values

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number: the shortest decimal that rounds to the stored float32, as config.json would have it."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_FLOAT32:
            raise ValueError(f"{self._where}: {self._prefix}{key} must be a finite number, found {value!r}")
        return float(str(np.float32(value)))

    def is_array(self, key: str) -> bool:
        """Whether a key is there and holds an array."""
        return isinstance(self._metadata.get(self._prefix + key), np.ndarray)

    def values(self, key: str) -> list | None:
        """An array of numbers as a list, or None if the key is absent."""
        if key not in self:
            return None
        value = self._get(key, None)
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{self._where}: {self._prefix}{key} must be an array of numbers, found {value!r:.80}")
        if len(value) > MAX_VALUES:
            raise ValueError(
                f"{self._where}: {self._prefix}{key} has {len(value)} numbers, at most {MAX_VALUES} can be"
            )
        return value.tolist()

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{self._where}: {self._prefix}{key} must be a string, found {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self._where}: {self._prefix}{key} must be true or false, found {value!r}")
        return value

    def check_all_used(self) -> None:
        """Raise ValueError that names the keys that were not read and are not harmless."""
        known = self._used | HARMLESS
        keys = [key.removeprefix(self._prefix) for key in self._metadata if key.startswith(self._prefix)]
        unknown = [k for k in keys if k not in known and not k.startswith(VISION) and not self._is_usual(k)]
        if unknown:
            named = ", ".join(f"{self._prefix}{key}" for key in unknown)
            raise ValueError(f"{self._where}: metadata not supported: {named}")

    def _is_usual(self, key: str) -> bool:
        value = self._metadata[self._prefix + key]
        return key in USUAL and not isinstance(value, np.ndarray) and value == USUAL[key]

    def _get(self, key: str, default: object) -> object:
        self._used.add(key)
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ValueError(f"{self._where}: metadata {self._prefix}{key} is missing")
        return value

    def _shared(self, key: str, values: np.ndarray) -> int:
        if len(values) == 0 or (key not in self._varying and (values != values[0]).any()):
            raise ValueError(f"{self._where}: {self._prefix}{key} differs between layers, which is not supported")
        return values[0].item()
