"""The tensors that a recorded program reads are those that `tiny` writes down from the checkpoints' own conventions."""

import math

import pytest

from lockstep.models.recording import record_on
from lockstep.models.registry import family_of, model_config
from lockstep.models.shapes import AnyTensor, only_shape
from lockstep.weights.tensor import TensorInfo, TensorMap
from tests.models import tiny
from tests.models.cases import CASES

FLAT = {name: config for name, config in CASES.items() if "text_config" not in config}


@pytest.mark.parametrize("name", FLAT)
def test_a_recorded_model_tells_the_shapes_of_its_tensors(name):
    """Stacked experts are told one by one, as GGUF files' are: of them only the numbers of weights are compared."""
    ops, expected = AnyTensor(), cut(CASES[name]["model_type"], tiny.shapes(CASES[name]))
    record_on(ops, model_config(CASES[name]))
    if "experts.gate_up_proj" not in " ".join(expected):
        assert ops.shapes == expected
    found = [split(shapes) for shapes in (ops.shapes, expected)]
    assert found[0] == found[1]


def cut(model_type, shapes):
    """The shapes as the model type's family cuts a checkpoint's tensors."""
    infos = {name: TensorInfo(name, "f32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}
    tensors = family_of(model_type).tensors(TensorMap(infos, infos.__getitem__))
    return {name: info.shape for name, info in tensors.info.items()}


def split(shapes):
    """(shapes of all tensors but the experts', weights of the experts)."""
    others = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    return others, sum(math.prod(shape) for name, shape in shapes.items() if name not in others)


@pytest.mark.parametrize("format", ["f32", "q8_0"])
def test_a_tensor_of_zeros_takes_no_memory(format):
    made = only_shape("w", (1 << 20, 1 << 12), format)
    assert (made.format, made.shape) == (format, (1 << 20, 1 << 12)) and not made.data[:2].any()
    assert made.data.strides[0] == 0
