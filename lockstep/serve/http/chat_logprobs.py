"""Log-probabilities in the shape of /v1/chat/completions: an object for each token, with its bytes."""
from lockstep.serve.http.legacy_logprobs import token_text


def chat_logprobs(tokenizer, request, start, end):
    """Those of output tokens start .. end of a request."""
    tops = request.top_logprobs or [{}] * end
    each = zip(request.output_ids[start:end], request.logprobs[start:end], tops[start:end])
    return dict(content=[_token(tokenizer, token_id, logprob, top) for token_id, logprob, top in each], refusal=None)


def _token(tokenizer, token_id, logprob, top):
    made = _described(tokenizer, token_id, logprob)
    return made | dict(top_logprobs=[_described(tokenizer, other, value) for other, value in top.items()])


def _described(tokenizer, token_id, logprob):
    return dict(token=token_text(tokenizer, token_id), logprob=logprob, bytes=list(tokenizer.token_bytes(token_id)))
