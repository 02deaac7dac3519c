"""Fields of OpenAI's API, Anthropic's, vLLM's or llama.cpp's server that a route here does not support.

They would change the answer, so they are refused by name. Only a neutral value, which changes nothing, is accepted,
since many clients send every field with its default. docs/server.md lists them. Unknown fields are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import model_validator

from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Fields, shown


@dataclass(frozen=True)
class RefusedField:
    """A field that is refused. neutral: whether a value changes nothing (null never does); expected: the neutral values
    in words; instead: how a client gets the same effect here."""

    neutral: Callable[[Any], bool]
    expected: str
    instead: str = ""


class KnownFields(Fields):
    """Fields of a body, or of an object in it, which refuses the fields in `refused` that it does not declare itself.

    inside: the path of an object that is not the whole body, such as "structured_outputs.".
    """

    refused: ClassVar[Mapping[str, RefusedField]] = {}
    inside: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_known(cls, value: Any) -> Any:
        """ApiError 400 that names the first refused field whose value is not neutral."""
        for name, given in value.items() if isinstance(value, dict) else ():
            field = None if given is None or name in cls.model_fields else cls.refused.get(name)
            if field is not None and not field.neutral(given):
                raise wrong_field(
                    cls.inside + name,
                    f"not supported, expected {field.expected}, got {shown(given)}"
                    f"{field.instead and '; '}{field.instead}",
                    "unsupported",
                )
        return value


class OnlyFields(Fields):
    """Fields of a body, or of an object in it, that are all: another one may be a misspelt one, so it is refused.

    inside: see KnownFields.
    """

    inside: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, value: Any) -> Any:
        """ApiError 400 that names the first field that is none of these."""
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                allowed = ", ".join(cls.model_fields)
                raise wrong_field(cls.inside + name[:40], f"no such field, expected one of {allowed}", "unknown_field")
        return value


def _only(*values: object, instead: str = "") -> RefusedField:
    """A field of which null and these values are neutral."""

    def neutral(given: object) -> bool:
        return any(given == each and isinstance(given, bool) == isinstance(each, bool) for each in values)

    return RefusedField(neutral, " or ".join([*map(shown, values), "none"]), instead)


def _at_most(limit: float) -> RefusedField:
    return RefusedField(lambda given: _is_number(given) and given <= limit, f"at most {limit:g} or none")


def _at_least(limit: float) -> RefusedField:
    return RefusedField(lambda given: _is_number(given) and given >= limit, f"at least {limit:g} or none")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _all(names: str, field: RefusedField) -> dict[str, RefusedField]:
    """Several fields, separated by spaces, that are refused alike."""
    return dict.fromkeys(names.split(), field)


# hints: the names that the same setting has on routes of this server
EFFORT = "it is reasoning.effort in /v1/responses, output_config.effort in /v1/messages"
SHAPE = "it is text.format in /v1/responses, output_config.format in /v1/messages"
LENGTH = "it is max_output_tokens in /v1/responses, max_tokens elsewhere"
SYSTEM = "it is instructions in /v1/responses, system in /v1/messages, a message elsewhere"
MIDDLE = "filling in the middle is not supported"
THOUGHT = f"use chat_template_kwargs or an effort: {EFFORT}, reasoning_effort in /v1/chat/completions"
STATE = "this server keeps nothing between requests, send the whole input"
TOKEN_IDS = "use return_token_ids in /v1/completions or /v1/chat/completions"

PROMPT = {
    **_all("add_special_tokens continue_final_message", _only(False)),
    **_all("chat_template_kwargs compaction media_io_kwargs mm_processor_kwargs", _only({})),
    **_all("conversation previous_response previous_response_id thread", _only(instead=STATE)),
    "continue_from": _only([], instead="use /v1/completions or /v1/chat/completions"),
    **_all("image_data input_extra mcp_servers messages previous_input_messages prompt_embeds tools", _only([])),
    **_all("input prompt", _only("", [])),
    **_all("input_prefix input_suffix", _only("", instead=MIDDLE)),
    **_all("personality truncate_prompt_tokens truncation_side web_search_options", _only()),
    "add_generation_prompt": _only(True),
    "chat_template": _only("", instead="a template comes with the model only"),
    "documents": _only([], instead="put them into a message"),
    "function_call": _only("none", "auto", instead="use tool_choice"),
    "functions": _only([], instead="use tools"),
    "generation_prompt": _only(""),
    "instructions": _only("", instead=SYSTEM),
    "multimodal_data": _only([], {}),
    "parallel_tool_calls": _only(True, instead="it is tool_choice.disable_parallel_tool_use in /v1/messages"),
    "reasoning": _only({}, instead=THOUGHT),
    "reasoning_effort": _only(instead=EFFORT),
    "system": _only("", [], instead=SYSTEM),
    "system_prompt": _only("", {}, instead="put it into a message"),
    "thinking": _only(instead=THOUGHT),
    "tool_choice": _only("none", "auto"),
}

FORM = {
    **_all("grammar grammar_type", _only("")),
    **_all("grammar_triggers preserved_tokens", _only([])),
    **_all("guided_choice guided_grammar guided_regex guided_whitespace_pattern structural_tag", _only()),
    **_all("guided_json json_schema output_format", _only(instead=SHAPE)),
    "grammar_lazy": _only(False),
    "output_config": _only({}, instead=SHAPE),
    "response_format": _only({"type": "text"}, instead=SHAPE),
    "structured_outputs": _only({}),
    "text": _only({}, {"format": {"type": "text"}}, instead=SHAPE),
}

CHOICE = {
    **_all("dry_multiplier mirostat", _only(0)),
    **_all("dynatemp_range top_n_sigma xtc_probability", _at_most(0)),
    **_all("early_stopping use_beam_search watermarking", _only(False)),
    **_all("logits_processors lora samplers", _only([])),
    **_all("tfs_z typical_p", _at_least(1)),
    "adaptive_target": RefusedField(lambda given: _is_number(given) and given < 0, "a negative number or none"),
    "length_penalty": _only(1),
    "min_keep": _at_most(1),
    "repetition_detection": _only(),
    "vllm_xargs": _only({}),
}

END = {
    **_all("max_completion_tokens max_output_tokens max_tokens n_predict", _only(-1, instead=LENGTH)),
    **_all("reasoning_budget_tokens thinking_budget_tokens thinking_token_budget", _only(-1)),
    **_all("t_max_predict_ms t_max_prompt_ms", _at_most(0)),
    "n_indent": _only(0),
    "reasoning_control": _only(False),
    "stop_sequences": _only([], instead="use stop"),
}

REPORT = {
    **_all("audio moderation prompt_logprobs", _only()),
    **_all("background echo enable_response_messages logprobs post_sampling_probs return_prompt_text", _only(False)),
    **_all("return_tokens_as_token_ids thinking_forced_open verbose", _only(False)),
    **_all("ec_transfer_params kv_transfer_params", _only({})),
    **_all("include_reasoning parse_tool_calls", _only(True)),
    **_all("logprob_token_ids response_fields", _only([])),
    **_all("return_token_ids return_tokens", _only(False, instead=TOKEN_IDS)),
    "chat_format": _only(0, "Content-only"),
    "chat_parser": _only(""),
    "modalities": _only(["text"]),
    "n_probs": _only(0, instead="use logprobs"),
    "reasoning_format": _only("auto", "deepseek"),
    "suffix": _only("", instead=MIDDLE),
    "top_logprobs": _only(0),
}

GENERATION = PROMPT | FORM | CHOICE | END | REPORT

OF_PROMPTS = "chat_template image_data media_io_kwargs messages mm_processor_kwargs multimodal_data truncation_side"
EMBEDDING = {name: PROMPT[name] for name in OF_PROMPTS.split()} | {
    "embd_normalize": _only(2, instead="use normalize"),
    "embed_dtype": _only("float32"),
    "endianness": _only("native", "little"),
    "padding": _only("do_not_pad"),
    "receipt": _only(False, instead="an embedding has no receipt"),
    "use_activation": _only(True, instead="use normalize"),
}

STRUCTURED = {
    **_all("disable_additional_properties disable_any_whitespace", _only(False)),
    **_all("structural_tag whitespace_pattern", _only()),
    "disable_fallback": _only(False, True),
}

STREAM = {"continuous_usage_stats": _only(False)}
