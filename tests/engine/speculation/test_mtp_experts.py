"""An MTP head with experts, stacked or one by one: all of it is read, and no answer changes."""

import re

import pytest

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.ops.linear.experts import ExpertLinear
from tests.engine.speculation.test_drafts import answer, run
from tests.engine.speculation.test_mtp import drop, loaded
from tests.models.cases import hybrid_experts, next_hybrid
from tests.models.test_qwen_experts import stacked

CONFIG = hybrid_experts(max_position_embeddings=4096, mtp_num_hidden_layers=1)

NEXT = next_hybrid(max_position_embeddings=4096, mtp_num_hidden_layers=1)


def restack(arrays):
    """Stacks the experts of a checkpoint's tensors in place."""
    made = stacked(arrays)
    arrays.clear()
    arrays.update(made)


@pytest.mark.parametrize(
    "config, change",
    [(CONFIG, lambda arrays: None), (CONFIG, restack), (NEXT, restack)],
    ids=["one by one", "stacked", "qwen3_next"],
)
def test_no_answer_changes(config, change, tmp_path):
    model, answers = loaded(tmp_path, config, change), []
    for options in (dict(speculate="off"), dict(speculate="mtp", draft=3)):
        engine = Engine(model, EngineOptions(threads=1, max_requests=3, kv_tokens=64 * 40, **options))
        requests = run(engine)
        answers.append([answer(r) for r in requests])
        engine.close()
    assert answers[0] == answers[1] and sum(r.num_drafted for r in requests) > 20


def test_experts_are_multiplied_in_eight_bits(tmp_path):
    used = [op.weight for op in loaded(tmp_path, CONFIG).recorded_mtp.ops if isinstance(op, ExpertLinear)]
    assert [weight.format for weight in used] == ["q8_0", "q8_0"]


@pytest.mark.parametrize(
    "name", ["gate", "shared_expert_gate", "shared_expert.down_proj", "experts.0.gate_proj", "experts.15.down_proj"]
)
def test_every_tensor_of_the_experts_is_read(name, tmp_path):
    made = loaded(tmp_path, CONFIG, drop(f"mtp.layers.0.mlp.{name}.weight"))
    with pytest.raises(ValueError, match=rf"tensor 'mtp\.layers\.0\.mlp\.{re.escape(name)}\.weight' .* is missing"):
        Engine(made, EngineOptions(threads=1, max_requests=1, speculate="mtp"))
