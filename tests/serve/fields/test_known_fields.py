"""The fields of other servers, by name: each is supported, refused, or documented as accepted without effect."""

import re

import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params

from lockstep.serve.errors import ApiError
from lockstep.serve.fields.body import Fields, check
from lockstep.serve.fields.chat import ChatFields, tool_use
from lockstep.serve.fields.messages import CountFields, MessagesFields
from lockstep.serve.fields.messages import tool_use as tool_use_of_messages
from lockstep.serve.fields.responses import ResponsesFields, input_messages
from lockstep.serve.fields.responses import tool_use as tool_use_of_responses
from lockstep.serve.routes.completions import CompletionFields
from lockstep.serve.routes.embeddings import EmbeddingFields
from tests.serve.fields.test_fields import BODIES, DOCS, by_generating_route, by_route, fields_of, params, read, refusal

LLAMA_CPP = """
    adaptive_decay adaptive_target add_generation_prompt backend_sampling cache_prompt chat_format chat_parser
    chat_template_kwargs continue_final_message dry_allowed_length dry_base dry_multiplier dry_penalty_last_n
    dry_sequence_breakers dynatemp_exponent dynatemp_range echo frequency_penalty generation_prompt grammar grammar_lazy
    grammar_triggers grammar_type id_slot ignore_eos input_extra input_prefix input_suffix json_schema logit_bias
    logprobs lora max_completion_tokens max_tokens messages min_keep min_p mirostat mirostat_eta mirostat_tau modalities
    n n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs parallel_tool_calls parse_tool_calls
    post_sampling_probs presence_penalty preserved_tokens prompt reasoning_budget_end_tag reasoning_budget_end_tags
    reasoning_budget_message reasoning_budget_start_tag reasoning_budget_tokens reasoning_control reasoning_format
    repeat_last_n repeat_penalty response_fields response_format return_progress return_tokens samplers seed
    sse_ping_interval stop stream stream_options t_max_predict_ms t_max_prompt_ms temperature thinking_budget_tokens
    thinking_forced_open timings_per_token tool_choice tools top_k top_logprobs top_n_sigma top_p typical_p verbose
    xtc_probability xtc_threshold""".split()
VLLM = """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template
    chat_template_kwargs continue_final_message documents ec_transfer_params echo enable_response_messages
    frequency_penalty guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    guided_whitespace_pattern ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params length_penalty
    logit_bias logits_processors logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages
    min_p min_tokens mm_processor_kwargs n parallel_tool_calls presence_penalty previous_input_messages
    previous_response priority prompt prompt_embeds prompt_logprobs reasoning_effort repetition_detection
    repetition_penalty request_id response_format return_mm_kwargs return_prompt_text return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed session_id skip_special_tokens
    spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options structural_tag
    structured_outputs suffix temperature thinking_token_budget tool_choice tools top_k top_logprobs top_p
    truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking""".split()
EMBEDDING_NAMES = """
    add_special_tokens cache_salt dimensions embd_normalize embed_dtype encoding_format endianness input
    media_io_kwargs messages mm_processor_kwargs model padding priority request_id truncate_prompt_tokens
    truncation_side use_activation user""".split()
CLIENTS = [
    (ChatFields, openai.types.chat.completion_create_params.CompletionCreateParamsStreaming),
    (CompletionFields, openai.types.completion_create_params.CompletionCreateParamsStreaming),
    (ResponsesFields, openai.types.responses.response_create_params.ResponseCreateParamsStreaming),
    (ResponsesFields, openai.types.responses.input_token_count_params.InputTokenCountParams),
    (EmbeddingFields, openai.types.embedding_create_params.EmbeddingCreateParams),
    (MessagesFields, message_create_params.MessageCreateParamsStreaming),
    (MessagesFields, beta_create_params.MessageCreateParamsStreaming),
    (CountFields, message_count_tokens_params.MessageCountTokensParams),
    (CountFields, beta_count_params.MessageCountTokensParams)]  # fmt: skip


def without_effect():
    """The fields that the documentation says are accepted without effect."""
    section = DOCS.read_text().partition("Accepted without effect")[2].partition("\n## ")[0]
    return set(re.findall(r"`([A-Za-z_.0-9]+)`", section))


def unknown(route, names):
    """Those of the names that a route would ignore without anybody having said so."""
    return sorted({*names} - route.model_fields.keys() - route.refused.keys() - without_effect())


@by_generating_route
def test_every_field_of_llama_cpp_and_vllm_is_known(route):
    assert unknown(route, LLAMA_CPP + VLLM) == []


def test_every_field_of_their_embeddings_is_known():
    assert unknown(EmbeddingFields, EMBEDDING_NAMES) == []


@pytest.mark.parametrize("route, made", CLIENTS, ids=lambda each: each.__module__.removeprefix("lockstep.serve."))
def test_every_field_of_the_clients_is_known(route, made):
    """What OpenAI's and Anthropic's own clients can send, as far as those that are installed know."""
    names = {name for base in made.__mro__ for name in getattr(base, "__annotations__", {})}
    assert len(names) > 4 and unknown(route, names) == []


@by_generating_route
def test_fields_that_no_answer_depends_on_are_accepted(route):
    names = {name for name in without_effect() if name not in route.model_fields and "." not in name}
    assert len(names) > 40
    assert read(route, **{name: {"some": ["value"]} for name in names}) == read(route)


@by_generating_route
def test_fields_that_were_ignored_are_refused_or_honoured(route):
    for name, asking in dict(
        reasoning_budget_tokens=0,
        return_tokens=True,
        chat_format=5,
        chat_parser="{}",
        watermarking=True,
        return_prompt_text=True,
        ec_transfer_params={"a": 1},
        verbose=True,
        thinking_budget_tokens=100,
        moderation={"model": "x"},
    ).items():
        assert refusal(route, **{name: asking}).param == name
    if "return_token_ids" not in route.model_fields:
        assert "use return_token_ids in /v1/completions" in refusal(route, return_token_ids=True).message
    read(route, return_token_ids=False, return_tokens=False, chat_format=0, reasoning_budget_tokens=-1)


@by_generating_route
def test_n_cmpl_is_n_and_counts_more(route):
    made = [params(route, **fields).n for fields in (dict(n_cmpl=2), dict(n_cmpl=2.0, n=3), dict(n=3, n_cmpl=None))]
    assert made == [2, 2, 3] and read(route).num_samples == 1
    with pytest.raises(ApiError, match="n_cmpl: expected at most 64, got 100") as caught:
        params(route, n_cmpl=100)
    assert caught.value.param == "n_cmpl"
    with pytest.raises(ApiError, match="the value of n_cmpl, 2, got 3"):
        params(route, n_cmpl=2, best_of=3)


@by_generating_route
def test_logit_bias_may_be_an_array_of_pairs(route):
    asked = [[], {}, None, [[5, 1.5], [7.0, -100]], {"5": 1.5, "7": -100}]
    assert [params(route, logit_bias=bias).logit_bias for bias in asked] == [{}] * 3 + [{5: 1.5, 7: -100}] * 2
    for wrong in ([5], [[5]], [["a", 1]], [[True, 1]], [[5.5, 1]], "x", 5):
        assert refusal(route, logit_bias=wrong).param == "logit_bias"
    assert "expected a number, got false" in refusal(route, logit_bias=[[5, False]]).message


@by_generating_route
def test_every_stream_has_its_options(route):
    for stream in (False, None):
        assert refusal(route, stream=stream, stream_options={}).param == "stream_options"
    asked = dict(stream=True, stream_options=dict(include_usage=True, include_obfuscation=False))
    assert read(route, **asked).streams_usage and not read(route).streams_usage
    if route in (ResponsesFields, MessagesFields):
        asked["stream_options"]["continuous_usage_stats"] = True
        assert refusal(route, **asked).param == "stream_options.continuous_usage_stats"
        asked["stream_options"]["continuous_usage_stats"] = False
        read(route, **asked)


# ---------------------------------------------------------------- kinds that are left out

OTHER = dict(type="mcp_toolset", mcp_server_name="x", name=5, description=[], parameters="", function=3, strict="")


def test_tools_of_other_kinds_are_left_out_whatever_they_hold():
    schema = dict(name="f", description="F.")
    for route, use, tool in (
        (ChatFields, tool_use, dict(type="function", function=schema)),
        (ResponsesFields, tool_use_of_responses, dict(type="function") | schema),
        (MessagesFields, tool_use_of_messages, dict(type="custom") | schema),
    ):
        found = use(read(route, tools=[OTHER, tool, OTHER])).tools
        assert [each.name for each in found] == ["f"]
        without_name = {key: value for key, value in tool.items() if key not in ("name", "function")}
        with pytest.raises(ApiError, match=r"tools\[1\].(name|function): this field is required") as caught:
            use(read(route, tools=[OTHER, without_name]))
        assert caught.value.param.startswith("tools[1].")


def test_items_of_other_kinds_are_left_out_whatever_they_hold():
    items = [
        dict(type="computer_call_output", output=dict(type="computer_screenshot"), content=5, role="robot"),
        dict(role="user", content="hello"),
    ]
    assert input_messages(read(ResponsesFields, input=items)) == [dict(role="user", content="hello")]


def test_null_stands_for_every_default():
    for made in fields_of():
        ours = made.model_fields.items() if made.__module__.startswith("lockstep") else ()
        optional = [name for name, field in ours if not field.is_required()]
        for name in optional:
            alias = made.model_fields[name].alias or name
            assert null_is_default(made, name, alias), (made, name)
    tools = [dict(type=None, function=dict(name="f"))]
    asked = read(ChatFields, tools=tools, tool_choice=dict(type=None, function=dict(name="f")))
    assert tool_use(asked).callable[0].name == "f"


def null_is_default(made, name, alias):
    """Whether null has no error of its own, and means what the default does."""
    try:
        return getattr(made.model_validate({alias: None}), name) == made.model_fields[name].default
    except Exception as error:
        return all(each["loc"][:1] != (alias,) for each in error.errors())


# ---------------------------------------------------------------- errors in the words of JSON

WRONG = [5, 5.5, "x", True, [], [5], [[5]], [None], {}, {"a": 5}, {"type": 5}, {"type": "function"}, [{}],
         [{"type": 5}], [{"type": "text", "text": 5}], [{"role": "user", "content": [3]}],
         [{"role": "user", "content": [{"type": 1}]}], [{"role": "user", "content": {}}],
         [{"role": "assistant", "tool_calls": [5]}],
         [{"type": "function", "function": {"name": 5}}], [{"type": "function", "parameters": [], "input_schema": []}],
         {"type": "json_schema", "json_schema": 5, "schema": 5, "format": 5}]  # fmt: skip


@by_route
def test_no_error_names_a_class(route):
    names = {made.__name__ for made in fields_of(Fields)} | {"instance", "dict", "dictionary", "NoneType", "BaseModel"}
    forbidden, count = re.compile(rf"\b({'|'.join(sorted(names))})\b"), 0
    for name in route.model_fields:
        for value in WRONG:
            try:
                check(route, BODIES[route] | {name: value})
            except ApiError as error:
                count += 1
                assert not forbidden.search(error.message.partition(", got")[0]), error.message
                assert error.message.startswith(name), error.message
    assert count > 50


def test_errors_say_what_json_calls_it():
    asked = dict(messages=[dict(role="user", content=[3])])
    assert refusal(ChatFields, **asked).message == "messages[0].content[0]: expected an object, got 3"
    assert refusal(ChatFields, tools=3).message == "tools: expected an array, got 3"
    assert refusal(ChatFields, stream="yes").message == 'stream: expected true or false, got "yes"'
    assert refusal(MessagesFields, thinking=[]).message == "thinking: expected an object, got []"
