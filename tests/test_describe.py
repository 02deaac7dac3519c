"""What `lockstep inspect` counts, for models with experts (for the others see test_cli_chat.py)."""
import pytest

from lockstep.describe import is_linear, memory, op_costs, packed_bytes
from lockstep.ops import BACKENDS
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.running import load

CONFIG = CASES["qwen3_moe"]


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
def test_experts_are_counted_as_they_are_packed(weights, tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), weights).recorded
    experts = [op for op in program.ops if op.kind.startswith("expert_linear_")]
    assert len(experts) == 2 * CONFIG["num_hidden_layers"]
    for op in experts:
        [weight] = [w for w in op.inputs if hasattr(w, "parts")]
        assert packed_bytes(weight) == sum(a.nbytes for a in BACKENDS["cpu"][op.kind].layout[1](weight))
    linear = [w for op in program.ops if is_linear(op) for w in op.inputs if hasattr(w, "parts")]
    assert memory(program)["packed_weights"] == sum(map(packed_bytes, linear))
    # norms and rope tables, no expert among them
    assert memory(program)["constants"] < 4 * CONFIG["num_experts"] * CONFIG["moe_intermediate_size"] * 64


def test_experts_work_for_the_rows_that_chose_them(tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), "q8_0").recorded
    costs = {cost.label.rpartition(".mlp.")[2]: cost for cost in op_costs(program, 10) if "experts." in cost.label}
    chosen, width, hidden = CONFIG["num_experts_per_tok"], CONFIG["moe_intermediate_size"], CONFIG["hidden_size"]
    assert costs["experts.gate_up"].flops == chosen * 2 * hidden * 2 * width
    assert costs["experts.down"].flops == chosen * 2 * width * hidden
    assert costs["experts.down"].weight_bytes == CONFIG["num_experts"] * hidden * width * 34 // 32
