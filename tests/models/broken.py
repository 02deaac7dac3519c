"""The bundled model with a final norm so large that its logits overflow; every weight is finite, so it loads."""

import json
import shutil

import ml_dtypes
import numpy as np

from lockstep.weights.hub import resolve_model

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


def overflowing(folder):
    """Writes the overflowing model; returns its folder."""
    copy = shutil.copytree(resolve_model(None), folder / "overflowing")
    raw = bytearray((copy / "model.safetensors").read_bytes())
    size = int.from_bytes(raw[:8], "little")
    [norm] = [entry for name, entry in json.loads(raw[8 : 8 + size]).items() if name.endswith("model.norm.weight")]
    begin, end = (8 + size + offset for offset in norm["data_offsets"])
    raw[begin:end] = np.full(norm["shape"], 3.38e38, DTYPES[norm["dtype"]]).tobytes()
    (copy / "model.safetensors").write_bytes(raw)
    return copy
