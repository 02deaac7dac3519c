"""The counts of `lockstep inspect` for models with experts (for other models see tests/commands/test_cli_chat.py)."""

import io

import pytest
from rich.console import Console

from lockstep.commands.bench import profile_table
from lockstep.engine.selfcheck.weights import stored as made_up
from lockstep.formats import BLOCK_FORMATS
from lockstep.lab.describe import is_linear, memory, op_costs, packed_bytes
from lockstep.lab.model_speed import summed
from lockstep.ops import BACKENDS
from lockstep.ops.linear.experts import ExpertLinear
from lockstep.runtime.program import Weight
from tests.models import tiny
from tests.models.cases import CASES, PER_LAYER
from tests.models.running import load

CONFIG = CASES["qwen3_moe"]
CEILING = {"bytes_per_second": 1e12, "int8_per_second": 1e6, "f32_per_second": 2e6}


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
def test_experts_are_counted_as_they_are_packed(weights, tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), weights).recorded
    experts = [op for op in program.ops if isinstance(op, ExpertLinear)]
    assert len(experts) == 2 * CONFIG["num_hidden_layers"]
    for op in experts:
        assert packed_bytes(op, op.weight) == sum(a.nbytes for a in BACKENDS["cpu"][op.kind].layout.make(op.weight))
    linear = [op for op in program.ops if is_linear(op)]
    assert memory(program)["packed_weights"] == sum(packed_bytes(op, op.weight) for op in linear)
    # norms and rope tables, no expert among them
    assert memory(program)["constants"] < 4 * CONFIG["num_experts"] * CONFIG["moe_intermediate_size"] * 64


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_every_format_is_counted_as_it_is_packed(format):
    stored = made_up("w", (40, 512), format)
    weight = Weight("w", format, stored.shape, (stored,))
    packed = BACKENDS["cpu"][f"linear_{format}"].layout.make(weight)
    assert packed_bytes(None, weight) == sum(a.nbytes for a in packed)


@pytest.mark.parametrize(("kv_dtype", "bytes_each"), [("f32", 4), ("bf16", 2), ("q8", 1)])
def test_an_8_bit_cache_takes_a_byte_and_a_scale_for_each_head(kv_dtype, bytes_each, tmp_path):
    config = CASES["qwen3"]
    model = load(tiny.write(tmp_path / "m", config, tiny.tensors(config, 1)), "f32", kv_dtype)
    G, K, scale = config["num_key_value_heads"], config["head_dim"], 2 if kv_dtype == "q8" else 0
    taken = memory(model.recorded)["kv_cache_per_token"]
    assert taken == 2 * config["num_hidden_layers"] * G * (K * bytes_each + scale)


def test_a_table_that_stays_in_its_file_is_counted_apart(tmp_path):
    arrays = tiny.tensors(PER_LAYER, 1)
    needed = memory(load(tiny.write(tmp_path / "m", PER_LAYER, arrays), "f32").recorded)
    for name, table in (("embedding", "embed_tokens"), ("table_in_file", "embed_tokens_per_layer")):
        assert needed[name] == arrays[f"model.{table}.weight"].nbytes


def test_experts_work_for_the_rows_that_chose_them(tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), "q8_0").recorded
    costs = {cost.label.rpartition(".mlp.")[2]: cost for cost in op_costs(program, 10) if "experts." in cost.label}
    chosen, width, hidden = CONFIG["num_experts_per_tok"], CONFIG["moe_intermediate_size"], CONFIG["hidden_size"]
    assert costs["experts.gate_up"].flops == chosen * 2 * hidden * 2 * width
    assert costs["experts.down"].flops == chosen * 2 * width * hidden
    assert costs["experts.down"].weight_bytes == CONFIG["num_experts"] * hidden * width * 34 // 32


@pytest.mark.parametrize(("weights", "int8"), [("q8_0", True), ("bf16", False)])
def test_a_profile_counts_what_every_op_with_weights_does(weights, int8, tmp_path):
    program = load(tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1)), weights).program
    for tokens in (1, 100):
        counts = {"T": tokens, "O": 1, "R": 1, "E": 0, "S": 1}
        rows = {kind: row for kind, *row in summed([(op, 1.0) for op in program.ops], counts)}
        assert set(rows) == {op.kind for op in program.ops} and rows["embed_f32"][1:] == [0, 0, False]
        experts = [op for op in program.ops if op.kind == f"expert_linear_{weights}"]
        macs = sum(counts[op.rows] * op.top_k * op.width * op.features for op in experts)
        shares = [min(1, counts[op.rows] * op.top_k / op.num_experts) for op in experts]
        read = sum(int(packed_bytes(op, op.weight) * share) for op, share in zip(experts, shares, strict=True))
        assert rows[experts[0].kind] == [len(experts), read, macs, int8]
    table = Console(file=io.StringIO(), width=200)
    table.print(profile_table("prefill", [(kind, *row) for kind, row in rows.items()], CEILING))
    line = next(line for line in table.file.getvalue().splitlines() if experts[0].kind in line)
    peak = CEILING["int8_per_second" if int8 else "f32_per_second"]
    assert line.split()[-1] == f"{2 * macs / len(experts) / peak:.0%}"
