"""Whole models in GGUF files of a few KB: how the tokenizer's metadata changes answers."""

import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.commands.parity import prompt_ids
from lockstep.text.conversation import ChatModel, Conversation
from lockstep.text.grammars import structured
from lockstep.text.grammars.structured import Grammars
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text.vocabularies import byte_level, gguf_metadata, words_metadata
from tests.weights import convert
from tests.weights.files import ARRAY, BOOL, FLOAT32, INT32, STRING, gguf_bytes, plain_tensors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYS = dict(
    block_count=1,
    context_length=256,
    embedding_length=64,
    feed_forward_length=64,
    attention__head_count=4,
    attention__head_count_kv=4,
    attention__layer_norm_rms_epsilon=1e-5,
    attention__key_length=16,
    attention__value_length=16,
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def typed(value):
    """A Python value with its GGUF type."""
    if not isinstance(value, list):
        return convert.typed(value)
    kinds = {str: STRING, int: INT32, float: FLOAT32, bool: BOOL}
    return ARRAY, (kinds[type(value[0])], value)


def write(path, metadata, **keys):
    """A qwen3 model of one layer with random weights."""
    rng, size = np.random.default_rng(1), len(metadata.get("tokenizer.ggml.tokens", range(96)))
    shapes = {"token_embd": (size, 64), "output_norm": (64,), "blk.0.attn_q_norm": (16,), "blk.0.attn_k_norm": (16,)}
    shapes |= {f"blk.0.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {
        f"blk.0.{name}": (64, 64)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    arrays = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    known = convert.metadata("qwen3", **KEYS, **keys) | {key: typed(value) for key, value in metadata.items()}
    path.write_bytes(gguf_bytes(known, plain_tensors(arrays)))
    return path


def chatml(kind=CONTROL, pre="qwen2", **more):
    """Metadata of a byte-level vocabulary with the marks of ChatML, of this type."""
    made = gguf_metadata(byte_level(), pre)
    made["tokenizer.ggml.tokens"] += MARKS
    made["tokenizer.ggml.token_type"] += [CONTROL, kind, kind]
    made["tokenizer.ggml.eos_token_id"] = len(made["tokenizer.ggml.tokens"]) - 3
    return made | {"tokenizer.chat_template": CHATML} | more


@pytest.fixture
def load(tmp_path):
    made = []

    def load(metadata, **keys):
        made.append(LLM(str(write(tmp_path / "m.gguf", metadata, **keys)), threads=1, max_requests=2))
        return made[-1]

    yield load
    for llm in made:
        llm.close()


def test_sentencepiece_answers_keep_their_first_space(load):
    llm = load(words_metadata())

    def answer(prompt, token, **options):
        token_id = llm.tokenizer.backend.token_to_id(token)
        return llm.generate([prompt], SamplingParams(max_tokens=2, logit_bias={token_id: 100}, **options))[0]

    assert answer("the", "▁cat").text == " cat cat" and answer("def f():\n", "▁▁▁").text == "      "
    assert answer([1], "▁cat").text == "cat cat", "there is no text before it"
    assert answer("the", "▁cat", stop=[" cat"]).text == "" and answer("the", "▁cat", stop=["t c"]).text == " ca"
    pieces = [
        chunk.text
        for chunk in llm.stream(
            "the", SamplingParams(max_tokens=2, logit_bias={llm.tokenizer.backend.token_to_id("▁cat"): 100})
        )
    ]
    assert pieces == [" cat", " cat"]
    grammars = Grammars(llm.tokenizer, llm.engine.eos_ids, llm.model.config.vocab_size)
    for prompt in ("the", [1]):
        mask = grammars.mask(structured.regex(" the(cat| cat){2}"))
        found = llm.generate([prompt], SamplingParams(max_tokens=20, logits_mask=mask))[0]
        assert found.finish_reason == "stop" and found.text in {
            f" the{a}cat{b}cat" for a in ("", " ") for b in ("", " ")
        }


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL])
def test_end_marks_of_any_type_end_answers(kind, load):
    llm = load(chatml(kind))
    end = llm.tokenizer.backend.token_to_id("<|im_end|>")
    answer = llm.generate([[10, 11]], SamplingParams(max_tokens=3, logit_bias={end: 100}))[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", end)
    begin = llm.tokenizer.backend.token_to_id("<|im_start|>")
    assert llm.chat_prompt([dict(role="user", content="hi")]).count(begin) == 2


@pytest.mark.parametrize("number, pooling", [(None, "last"), (0, "last"), (1, "mean"), (3, "last")])
def test_embeddings_are_pooled_as_the_file_says(number, pooling, load):
    llm = load(chatml(), **({} if number is None else {"pooling_type": number}))
    prompts = [[10, 11, 12], [13]]
    assert llm.embed(prompts).tobytes() == llm.embed(prompts, pooling=pooling).tobytes()
    other = dict(last="mean", mean="last")[pooling]
    assert llm.embed(prompts).tobytes() != llm.embed(prompts, pooling=other).tobytes()


@pytest.mark.parametrize("model", ["none", "t5"])
def test_token_ids_without_a_tokenizer(model, load):
    llm = load({"tokenizer.ggml.model": model})
    answer = llm.generate([[10, 11]], SamplingParams(max_tokens=3))[0]
    assert len(answer.token_ids) == 3 and answer.text == "" and not llm.has_tokenizer
    for refused in (lambda: llm.encode("text"), lambda: llm.generate([[1]], SamplingParams(stop=["x"]))):
        with pytest.raises(ValueError, match=r"token ids|stop_token_ids"):
            refused()


def test_token_ids_with_an_unknown_pre_tokenizer(load, tmp_path):
    llm = load(chatml(pre="kimi-k2"))
    answer = llm.generate([[10, 11]], SamplingParams(max_tokens=3, stop=["\0"]))[0]
    assert answer.text == llm.tokenizer.decode(answer.token_ids) != ""
    for refused in (lambda: llm.encode("text"), lambda: llm.chat_prompt([dict(role="user", content="hi")])):
        with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre 'kimi-k2' is not supported.*must be token ids"):
            refused()
    assert len(prompt_ids(llm, "text", 7)) == 7
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre 'kimi-k2' is not supported"):
        LLM(str(tmp_path / "m.gguf"), needs_chat=True)


def test_ids_that_no_token_has(load, caplog):
    llm = load(words_metadata() | {"tokenizer.ggml.bos_token_id": 0xFFFFFFFF, "tokenizer.ggml.eos_token_id": 1 << 20})
    assert llm.engine.eos_ids == {2} and "bos_token_id 4294967295 is none of" in caplog.text
    assert llm.generate(["the"], SamplingParams(max_tokens=1))[0].token_ids


def test_named_templates(load):
    llm = load(
        chatml(
            **{
                "tokenizer.chat_templates": ["tool_use"],
                "tokenizer.chat_template.tool_use": "TOOLS {{ tools | tojson }} " + CHATML,
            }
        )
    )
    chat = ChatModel(llm.tokenizer, llm.engine.eos_ids, llm.model.config.vocab_size)
    hello = [dict(role="user", content="hi")]
    use = ToolUse((Tool("f", "does f", dict(type="object", properties={})),))
    prompt = chat.prompt(Conversation(hello, use))
    assert prompt.startswith('TOOLS [{"type": "function", "function": {"name": "f"')
    assert "system\nTo call one, write its name and arguments as JSON:\n<tool_call>" in prompt
    assert chat.prompt(Conversation(hello)).startswith("<|im_start|>user\nhi<|im_end|>")
