"""Shared by /v1/chat/completions, /v1/responses and /v1/messages: starting a Conversation and reading its answer."""

from lockstep.engine.request import Request
from lockstep.serve.errors import bad_request
from lockstep.serve.fields.body import read_fields
from lockstep.serve.fields.continuation import continuation
from lockstep.serve.fields.prediction import predicted_ids
from lockstep.serve.fields.prompts import text_tokenizer
from lockstep.serve.fields.sampling import most_tokens, sampling_params
from lockstep.serve.generation import Generation
from lockstep.serve.service import Service
from lockstep.serve.token_masks import combined_masks, narrowing_fields
from lockstep.text.tool_calls import events as call_events
from lockstep.text.tool_calls.events import Arguments, CallStart


async def start(generation: Generation, fields, conversation, **reports):
    """Queues the samples of a conversation; returns a function that makes a parser for the answer of one sample.

    fields: the SamplingFields of the request; conversation: makes the Conversation of these fields, in a worker thread;
    reports: further arguments of SamplingParams, such as logprobs.
    """
    service = generation.service

    def prepare():
        asked = conversation(fields)
        covers_answer = asked.grammar is not None or asked.tools.must_call
        prepared = chat_model(service).prepare(asked, fields.num_samples)
        [mask] = combined_masks(service, fields, [prepared.options["logits_mask"]], covers_answer)
        return prepared, mask, predicted_ids(service, fields.prediction)

    prepared, mask, predicted = await generation.offload(prepare)
    room = service.max_context - len(prepared.ids)
    if room < 1:
        raise bad_request(
            f"the conversation has {len(prepared.ids)} tokens, which leaves no room for an answer in the "
            f"context of {service.max_context} tokens",
            "messages",
            "context_length_exceeded",
        )
    if not prepared.options.get("skip_special_tokens", True):
        fields.skip_special_tokens = False
    most, defaults = most_tokens(fields, room), service.sampling_defaults
    params = sampling_params(fields, service.limits, most, defaults, logits_mask=mask, **reports)
    prompts = [(prepared.ids, params)]
    begun = await generation.prepare(continuation, service, fields, prompts)
    await generation.start(prompts, fields.cache_salt or "", narrowing_fields(fields), predicted, begun)
    return prepared.new_parser


def chat_model(service: Service):
    """The service's ChatModel. ApiError 400 where the model has no tokenizer or no chat template."""
    if service.chat is None or not text_tokenizer(service).has_chat_template:
        raise bad_request(
            "this model has no chat template, so it can only continue text: use /v1/completions",
            "messages",
            "no_chat_template",
        )
    return service.chat


async def count(request, service: Service, fields_type, conversation):
    """The number of tokens in the prompt of a request, whose body is read as fields_type."""
    fields = await read_fields(request, service, fields_type)

    def counted() -> int:
        prompt = chat_model(service).prompt(conversation(fields))
        return len(text_tokenizer(service).encode(prompt, False, service.max_counted))

    return await service.offload(counted)


def read_all(new_parser, request):
    """The parser's events for the whole text of a finished request."""
    parser = new_parser()
    return parser.push(request.text) + parser.finish(request.finish_reason == "length")


def finish_reason(request: Request, num_calls: int) -> str:
    """OpenAI's finish_reason of a request that has ended: "stop", "length" or "tool_calls"."""
    assert request.finish_reason is not None, "it has ended"
    return call_events.finish_reason(request.finish_reason, num_calls)


def count_calls(events, before: int = 0):
    """The number of tool calls after these events; before: their number before the events. 0 where the answer ended
    within a call's arguments, which the parser then completed: such an answer asks for no call."""
    if events and isinstance(events[-1], Arguments) and events[-1].is_cut:
        return 0
    return before + sum(isinstance(event, CallStart) for event in events)
