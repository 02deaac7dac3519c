"""Random vocabularies and texts: tekken.json files, and with the sentencepiece package tokenizer.model files."""

import base64
import io
import json
import random

WORDS = (
    "the of and model Größe café naïve 日本語 привет שלום def return self. ( ); == -> 3.14 , . ' \" — 🙂 1234".split()
)
ODD = ["\n", "\t", "\r\n", "\u00a0", "▁", "\x00", "\u200d", "e\u0301\u0302", "ﬁ", "<0x0A>", "[INST", "don't", "ab" * 5]
SPECIAL = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]
[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]
[TOOL_CONTENT]""".split()
LATER = ["[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"]
OF_V15 = ["[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
EFFORTS = dict(type="enum", values=["none", "high"], accepts_none=True, default="high")
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]".split()
OF_V3, OF_V7 = ["[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"], ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
BYTES = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
# {name: options of the trainer}; what Llama and Mistral, Gemma, and others have
TRAINED = {
    "v1": dict(model_type="bpe", **BYTES),
    "v3": dict(model_type="bpe", control_symbols=CONTROL + OF_V3, **BYTES),
    "v7": dict(model_type="bpe", control_symbols=CONTROL + OF_V3 + OF_V7, **BYTES),
    "user_defined": dict(
        model_type="bpe", **BYTES, add_dummy_prefix=False, split_by_whitespace=False,
        user_defined_symbols=["▁▁", "▁▁▁", "<ud>", "abc", "\n", "the "],
    ),
    "own_after_prefix": dict(model_type="bpe", **BYTES, user_defined_symbols=["<ud>", "▁▁", "ab"]),
    "few_spaces": dict(model_type="bpe", normalization_rule_name="identity", byte_fallback=False),
    "unigram": dict(model_type="unigram", **BYTES),
    "unigram_few_spaces": dict(model_type="unigram", normalization_rule_name="identity", add_dummy_prefix=False),
}  # fmt: skip


def text(rng: random.Random, parts: int) -> str:
    """A text of words, runs of spaces, letters that are merged in many ways, and odd characters."""

    def part() -> str:
        kind = rng.randrange(8)
        if kind == 0:
            return " " * rng.choice([1, 2, 3, rng.randrange(1, 40)])
        if kind == 1:
            return chr(
                rng.choice([rng.randrange(33, 127), rng.randrange(0xA1, 0x600), rng.randrange(0x1F300, 0x1F600)])
            )
        if kind == 2:
            return rng.choice(ODD)
        if kind == 3:
            return "".join(rng.choice("abcAB ") for _ in range(rng.randrange(1, 14)))
        return rng.choice(WORDS) + rng.choice(["", " "])

    return "".join(part() for _ in range(parts))


def tekken(rng: random.Random, version: str = "v3", tokens: int = 300, special: list[str] | None = None) -> dict:
    """The content of a tekken.json of random tokens: each is two others, so that many are reached in several ways."""
    known = [bytes([i]) for i in range(256)]
    letters = [b"a", b"b", b" ", b"c", "é".encode(), "日".encode()[:2], b"\n", b"1"]
    while len(known) < 256 + tokens:
        made = rng.choice(letters) + rng.choice(letters)
        if made not in known and len(made) <= 16:
            known.append(made)
            letters.append(made)
    vocab = [
        dict(rank=rank, token_bytes=base64.b64encode(token).decode(), token_str=None)
        for rank, token in enumerate(known)
    ]
    vocab += [dict(rank=len(known), token_bytes=base64.b64encode(b"unused").decode(), token_str="unused")]
    config = dict(
        pattern=PATTERN, num_vocab_tokens=len(vocab), default_vocab_size=40 + len(known), default_num_special_tokens=40,
        version=version,
    )  # fmt: skip
    listed = [dict(rank=rank, token_str=token, is_control=True) for rank, token in enumerate(special or ())]
    content = dict(config=config, vocab=vocab, **(dict(special_tokens=listed) if special else {}))
    return content | (dict(model_settings_builder=dict(reasoning_effort=EFFORTS)) if version == "v15" else {})


def tekken_bytes(content: dict) -> bytes:
    return json.dumps(content).encode()


def trained(rng: random.Random, name: str, size: int = 420) -> bytes:
    """A tokenizer.model that sentencepiece learns from random texts of few characters."""
    import sentencepiece

    few = lambda: "".join(rng.choice(["a", "b", "c", "ab", " ", "  ", "the ", "é", "日", "\n"]) for _ in range(30))
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([few() for _ in range(60)]), model_writer=file, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, vocab_size=size if TRAINED[name].get("byte_fallback") else size - 256, **TRAINED[name],
    )  # fmt: skip
    return file.getvalue()


# ------------------------------------------------------------ conversations

TOOL = dict(
    type="function",
    function=dict(
        name="get_weather",
        description="Says the weather, é.",
        parameters=dict(type="object", properties=dict(city=dict(type="string")), required=["city"]),
    ),
)


def said(role: str, content: str, **more: object) -> dict:
    return dict(role=role, content=content, **more)


def _call(number: int, city: str) -> dict:
    return dict(id=f"abcdefgh{number}", type="function", function=dict(name="get_weather", arguments=dict(city=city)))


PLAIN = [
    [said("user", "ab cab")],
    [said("user", " ab  ab"), said("assistant", "the ab. "), said("user", "ab\n\nab é日")],
    [said("system", "the the."), said("user", "a"), said("assistant", "b"), said("user", "c")],
    [said("user", "a"), said("user", "b"), said("assistant", "c"), said("user", "the")],
    [said("system", "a"), said("system", "b"), said("user", "c")],
]
CALLED = said("assistant", "", tool_calls=[_call(1, "ab é")])
WITH_TOOLS = [
    [said("user", "the?")],
    [said("user", "the?"), CALLED, said("tool", "it ab", tool_call_id="abcdefgh1")],
    [
        said("system", "a"), said("user", "the?"), said("assistant", "", tool_calls=[_call(1, "a"), _call(2, "b")]),
        said("tool", "a", tool_call_id="abcdefgh1"), said("tool", "b", tool_call_id="abcdefgh2"),
        said("assistant", "the ab"), said("user", "the"),
    ],
]  # fmt: skip
BESIDE = [[said("user", "the?"), CALLED | dict(content="ab"), said("tool", "a", tool_call_id="abcdefgh1")]]


def conversations(version: str) -> list[tuple[list[dict], bool]]:
    """(messages, whether with TOOL) of a version of Mistral's tokenizers."""
    called = [] if version in ("v1", "v2") else WITH_TOOLS + (BESIDE if version != "v3" else [])
    return [(messages, False) for messages in PLAIN] + [(messages, True) for messages in called]
