"""Makes a torchvision wheel built for another torch importable (Python parts only, no operators).

vllm's Qwen3.5 text model imports torchvision.transforms although it never calls it; the stock wheel dies on import
because its binary does not load and it then registers fake kernels for operators nobody declared. Declare them.
Run with the interpreter of the virtual environment.
"""

import importlib.util
import os

path = os.path.join(os.path.dirname(importlib.util.find_spec("torchvision").origin), "_meta_registrations.py")
text = open(path).read()
mark = "import torchvision.extension  # noqa: F401\n"
if "peers patch" not in text:
    assert mark in text, "unexpected torchvision version"
    text = text.replace(
        mark,
        mark
        + """
if not torchvision.extension._has_ops():  # peers patch
    _peers_lib = torch.library.Library("torchvision", "DEF")
    for _op in ("nms", "qnms"):
        _peers_lib.define(_op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
""",
        1,
    )
    open(path, "w").write(text)
