"""Fields that OpenAI's API, Anthropic's, vLLM or llama.cpp's server know and a route here does not have.

They would change the answer, so they are refused by name; only a value that asks for nothing is accepted, since many
clients send all that they know with its default. docs/server.md lists them. Fields that nobody knows are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import model_validator

from lockstep.serve.http.body import Fields, shown
from lockstep.serve.http.errors import bad_request


@dataclass(frozen=True)
class Known:
    """A field that is refused. neutral: whether a value asks for nothing, which null always does; expected: what such
    values are; instead: what a client may do to get the same."""

    neutral: Callable[[Any], bool]
    expected: str
    instead: str = ""


class KnownFields(Fields):
    """Fields of a body beside which other servers know more: those of `refused`, as far as they are no fields of this.

    inside: the place of an object that is not the whole body, such as "structured_outputs.".
    """

    refused: ClassVar[Mapping[str, Known]] = {}
    inside: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_known(cls, value: Any) -> Any:
        """ApiError 400 that names the first field of a body that is known, not had, and asks for something."""
        for name, given in value.items() if isinstance(value, dict) else ():
            known = None if given is None or name in cls.model_fields else cls.refused.get(name)
            if known is not None and not known.neutral(given):
                place = cls.inside + name
                raise bad_request(
                    f"{place}: not supported, expected {known.expected}, got {shown(given)}"
                    f"{known.instead and '; '}{known.instead}",
                    place,
                    "unsupported",
                )
        return value


def _only(*values: object, instead: str = "") -> Known:
    """Null and these values ask for nothing."""

    def neutral(given: object) -> bool:
        return any(given == each and isinstance(given, bool) == isinstance(each, bool) for each in values)

    return Known(neutral, " or ".join([*map(shown, values), "none"]), instead)


def _at_most(limit: float) -> Known:
    return Known(lambda given: _is_number(given) and given <= limit, f"at most {limit:g} or none")


def _at_least(limit: float) -> Known:
    return Known(lambda given: _is_number(given) and given >= limit, f"at least {limit:g} or none")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# the names that routes have for the same
EFFORT = "it is reasoning.effort in /v1/responses, output_config.effort in /v1/messages"
SHAPE = "it is text.format in /v1/responses, output_config.format in /v1/messages"
LENGTH = "it is max_output_tokens in /v1/responses, max_tokens elsewhere"
SYSTEM = "it is instructions in /v1/responses, system in /v1/messages, a message elsewhere"
THOUGHT = f"use chat_template_kwargs or an effort: {EFFORT}, reasoning_effort in /v1/chat/completions"
STATE = "this server keeps nothing between requests, send the whole input"
TOKEN_IDS = "use return_token_ids in /v1/completions or /v1/chat/completions"

PROMPT = {
    "add_generation_prompt": _only(True),
    "add_special_tokens": _only(False),
    "chat_template": _only("", instead="a template comes with the model only"),
    "chat_template_kwargs": _only({}),
    "compaction": _only({}),
    "continue_final_message": _only(False),
    "conversation": _only(instead=STATE),
    "documents": _only([], instead="put them into a message"),
    "function_call": _only("none", "auto", instead="use tool_choice"),
    "functions": _only([], instead="use tools"),
    "generation_prompt": _only(""),
    "image_data": _only([]),
    "input": _only("", []),
    "input_extra": _only([]),
    "input_prefix": _only("", instead="filling in the middle is not supported"),
    "input_suffix": _only("", instead="filling in the middle is not supported"),
    "instructions": _only("", instead=SYSTEM),
    "mcp_servers": _only([]),
    "media_io_kwargs": _only({}),
    "messages": _only([]),
    "mm_processor_kwargs": _only({}),
    "multimodal_data": _only([], {}),
    "parallel_tool_calls": _only(True, instead="it is tool_choice.disable_parallel_tool_use in /v1/messages"),
    "personality": _only(),
    "previous_input_messages": _only([]),
    "previous_response": _only(instead=STATE),
    "previous_response_id": _only(instead=STATE),
    "prompt": _only("", []),
    "prompt_embeds": _only([]),
    "reasoning": _only({}, instead=THOUGHT),
    "reasoning_effort": _only(instead=EFFORT),
    "system": _only("", [], instead=SYSTEM),
    "system_prompt": _only("", {}, instead="put it into a message"),
    "thinking": _only(instead=THOUGHT),
    "thread": _only(instead=STATE),
    "tool_choice": _only("none", "auto"),
    "tools": _only([]),
    "truncate_prompt_tokens": _only(),
    "truncation_side": _only(),
    "web_search_options": _only(),
}

FORM = {
    "grammar": _only(""),
    "grammar_lazy": _only(False),
    "grammar_triggers": _only([]),
    "grammar_type": _only(""),
    "guided_choice": _only(),
    "guided_grammar": _only(),
    "guided_json": _only(instead=SHAPE),
    "guided_regex": _only(),
    "guided_whitespace_pattern": _only(),
    "json_schema": _only(instead=SHAPE),
    "output_config": _only({}, instead=SHAPE),
    "output_format": _only(instead=SHAPE),
    "preserved_tokens": _only([]),
    "response_format": _only({"type": "text"}, instead=SHAPE),
    "structural_tag": _only(),
    "structured_outputs": _only({}),
    "text": _only({}, {"format": {"type": "text"}}, instead=SHAPE),
}

CHOICE = {
    "adaptive_target": Known(lambda given: _is_number(given) and given < 0, "a negative number or none"),
    "dry_multiplier": _only(0),
    "dynatemp_range": _at_most(0),
    "early_stopping": _only(False),
    "length_penalty": _only(1),
    "logits_processors": _only([]),
    "lora": _only([]),
    "min_keep": _at_most(1),
    "mirostat": _only(0),
    "repetition_detection": _only(),
    "samplers": _only([]),
    "tfs_z": _at_least(1),
    "top_n_sigma": _at_most(0),
    "typical_p": _at_least(1),
    "use_beam_search": _only(False),
    "vllm_xargs": _only({}),
    "watermarking": _only(False),
    "xtc_probability": _at_most(0),
}

END = {
    "max_completion_tokens": _only(-1, instead=LENGTH),
    "max_output_tokens": _only(-1, instead=LENGTH),
    "max_tokens": _only(-1, instead=LENGTH),
    "n_indent": _only(0),
    "n_predict": _only(-1, instead=LENGTH),
    "reasoning_budget_tokens": _only(-1),
    "reasoning_control": _only(False),
    "stop_sequences": _only([], instead="use stop"),
    "t_max_predict_ms": _at_most(0),
    "t_max_prompt_ms": _at_most(0),
    "thinking_budget_tokens": _only(-1),
    "thinking_token_budget": _only(-1),
}

REPORT = {
    "audio": _only(),
    "background": _only(False),
    "chat_format": _only(0, "Content-only"),
    "chat_parser": _only(""),
    "ec_transfer_params": _only({}),
    "echo": _only(False),
    "enable_response_messages": _only(False),
    "include_reasoning": _only(True),
    "kv_transfer_params": _only({}),
    "logprob_token_ids": _only([]),
    "logprobs": _only(False),
    "modalities": _only(["text"]),
    "moderation": _only(),
    "n_probs": _only(0, instead="use logprobs"),
    "parse_tool_calls": _only(True),
    "post_sampling_probs": _only(False),
    "prompt_logprobs": _only(),
    "reasoning_format": _only("auto", "deepseek"),
    "response_fields": _only([]),
    "return_prompt_text": _only(False),
    "return_token_ids": _only(False, instead=TOKEN_IDS),
    "return_tokens": _only(False, instead=TOKEN_IDS),
    "return_tokens_as_token_ids": _only(False),
    "suffix": _only("", instead="filling in the middle is not supported"),
    "thinking_forced_open": _only(False),
    "top_logprobs": _only(0),
    "verbose": _only(False),
}

GENERATION = PROMPT | FORM | CHOICE | END | REPORT

EMBEDDING = {
    name: PROMPT[name]
    for name in (
        "chat_template",
        "image_data",
        "media_io_kwargs",
        "messages",
        "mm_processor_kwargs",
        "multimodal_data",
        "truncation_side",
    )
} | {
    "embd_normalize": _only(2, instead="use normalize"),
    "embed_dtype": _only("float32"),
    "endianness": _only("native", "little"),
    "padding": _only("do_not_pad"),
    "use_activation": _only(True, instead="use normalize"),
}

STRUCTURED = {
    "disable_additional_properties": _only(False),
    "disable_any_whitespace": _only(False),
    "disable_fallback": _only(False, True),
    "structural_tag": _only(),
    "whitespace_pattern": _only(),
}

STREAM = {
    "continuous_usage_stats": _only(False),
}
