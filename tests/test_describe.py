"""What `lockstep inspect` counts, for models with experts (for the others see test_cli_chat.py)."""

import pytest

from lockstep.describe import is_linear, memory, op_costs, packed_bytes
from lockstep.engine import selfcheck
from lockstep.models.record import INTEGER_FORMATS
from lockstep.ops import BACKENDS
from lockstep.ops.experts import ExpertLinear
from lockstep.runtime.program import Weight
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.running import load

CONFIG = CASES["qwen3_moe"]


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
def test_experts_are_counted_as_they_are_packed(weights, tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), weights).recorded
    experts = [op for op in program.ops if isinstance(op, ExpertLinear)]
    assert len(experts) == 2 * CONFIG["num_hidden_layers"]
    for op in experts:
        assert packed_bytes(op.weight) == sum(a.nbytes for a in BACKENDS["cpu"][op.kind].layout.make(op.weight))
    linear = [op.weight for op in program.ops if is_linear(op)]
    assert memory(program)["packed_weights"] == sum(map(packed_bytes, linear))
    # norms and rope tables, no expert among them
    assert memory(program)["constants"] < 4 * CONFIG["num_experts"] * CONFIG["moe_intermediate_size"] * 64


@pytest.mark.parametrize("format", INTEGER_FORMATS)
def test_every_format_is_counted_as_it_is_packed(format):
    stored = selfcheck.stored("w", (40, 512), format)
    weight = Weight("w", format, stored.shape, (stored,))
    packed = BACKENDS["cpu"][f"linear_{format}"].layout.make(weight)
    assert packed_bytes(weight) == sum(a.nbytes for a in packed)


@pytest.mark.parametrize(("kv_dtype", "bytes_each"), [("f32", 4), ("bf16", 2), ("q8", 1)])
def test_an_8_bit_cache_takes_a_byte_and_a_scale_for_each_head(kv_dtype, bytes_each, tmp_path):
    config = CASES["qwen3"]
    model = load(tiny.write(tmp_path / "m", config, tiny.tensors(config, 1)), "f32", kv_dtype)
    G, K, scale = config["num_key_value_heads"], config["head_dim"], 2 if kv_dtype == "q8" else 0
    taken = memory(model.recorded)["kv_cache_per_token"]
    assert taken == 2 * config["num_hidden_layers"] * G * (K * bytes_each + scale)


def test_experts_work_for_the_rows_that_chose_them(tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), "q8_0").recorded
    costs = {cost.label.rpartition(".mlp.")[2]: cost for cost in op_costs(program, 10) if "experts." in cost.label}
    chosen, width, hidden = CONFIG["num_experts_per_tok"], CONFIG["moe_intermediate_size"], CONFIG["hidden_size"]
    assert costs["experts.gate_up"].flops == chosen * 2 * hidden * 2 * width
    assert costs["experts.down"].flops == chosen * 2 * width * hidden
    assert costs["experts.down"].weight_bytes == CONFIG["num_experts"] * hidden * width * 34 // 32
