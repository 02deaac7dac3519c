"""What /v1/chat/completions, /v1/responses and /v1/messages share: a Conversation is started, its answer is read."""

from lockstep.engine.request import Request
from lockstep.serve.errors import bad_request
from lockstep.serve.fields.body import read_fields
from lockstep.serve.fields.prediction import predicted_ids
from lockstep.serve.fields.prompts import text_tokenizer
from lockstep.serve.fields.sampling import most_tokens, sampling_params
from lockstep.serve.generation import Job
from lockstep.serve.service import Service
from lockstep.serve.token_masks import combined, narrowing
from lockstep.text.tool_calls.events import Arguments, CallStart


async def start(job: Job, fields, conversation, **reports):
    """Queues the samples of a conversation; returns what makes a parser for each.

    fields: the SamplingFields of the request; conversation: called with them in a worker thread, returns the
    Conversation; reports: arguments of SamplingParams, such as logprobs.
    """
    service = job.service

    def prepare():
        made = conversation(fields)
        has_form = made.grammar is not None or made.tools.must_call
        prepared = chat_model(service).prepare(made, fields.num_samples)
        [mask] = combined(service, fields, [prepared.options["logits_mask"]], has_form)
        return prepared, mask, predicted_ids(service, fields.prediction)

    prepared, mask, predicted = await job.offload(prepare)
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
    most, defaults = most_tokens(fields, room), service.loaded.sampling_defaults
    params = sampling_params(fields, service.limits, most, defaults, logits_mask=mask, **reports)
    await job.start([(prepared.ids, params)], fields.cache_salt or "", narrowing(fields), predicted)
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
    """How many tokens the prompt of a request has, which is read as fields_type."""
    fields = await read_fields(request, service, fields_type)

    def counted() -> int:
        prompt = chat_model(service).prompt(conversation(fields))
        return len(text_tokenizer(service).encode(prompt, False, service.max_counted))

    return await service.offload(counted)


def read_all(new_parser, request):
    """The events of a finished request's whole text."""
    parser = new_parser()
    return parser.push(request.text) + parser.finish(request.finish_reason == "length")


def finish_reason(request: Request, num_calls: int) -> str:
    """ "stop", "length" or "tool_calls"."""
    assert request.finish_reason is not None, "it has ended"
    return "tool_calls" if num_calls and request.finish_reason == "stop" else request.finish_reason


def count_calls(events, before: int = 0):
    """How many tool calls there are after these events; before: how many there were before them. 0 where the answer
    ended within the arguments of one, which were completed for it: such an answer asks for no call."""
    if events and isinstance(events[-1], Arguments) and events[-1].is_cut:
        return 0
    return before + sum(isinstance(event, CallStart) for event in events)
