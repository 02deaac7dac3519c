"""/v1/embeddings: a vector for each text, pooled from the model's last hidden states."""

import base64
from typing import Any, ClassVar, Literal

from starlette.routing import Route

from lockstep.engine.embedding import Pool
from lockstep.engine.request import SamplingParams
from lockstep.serve.answers.json_response import Parts
from lockstep.serve.answers.sse import json_answer
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import Whole
from lockstep.serve.fields.known import EMBEDDING, KnownFields
from lockstep.serve.fields.prompts import read_prompts
from lockstep.serve.fields.sampling import UNTIL_FULL, CacheSalt, MostTokens
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.service import Service


class EmbeddingFields(KnownFields):
    """The body of a request. pooling and normalize: see LLM.embed."""

    refused: ClassVar = EMBEDDING

    model: str | None = None
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: MostTokens | None = None
    cache_salt: CacheSalt | None = None


def routes(service: Service):
    async def embed(generation: Generation):
        fields = await generation.read(EmbeddingFields)
        _check_dimensions(fields.dimensions, service.hidden_size)
        inputs = await generation.offload(read_inputs, service, fields)
        params = SamplingParams(pooling=fields.pooling or await generation.offload(lambda: service.pooling))
        await generation.start([(ids, params) for ids in inputs], fields.cache_salt or "")
        await generation.finished()
        generation.count_prompts()
        size = len(inputs) * service.hidden_size
        return await json_answer(generation, lambda: _answer(generation, fields), size=size)

    return [Route("/v1/embeddings", GenerationEndpoint(service, embed), methods=["POST"])]


def _check_dimensions(dimensions, hidden_size) -> None:
    # only models that are trained for it have embeddings whose first numbers can be used alone
    if dimensions not in (None, hidden_size):
        problem = f"this model's embeddings have {hidden_size}, and cannot be shortened to {dimensions}"
        raise wrong_field("dimensions", problem, "unsupported")


def read_inputs(service: Service, fields: EmbeddingFields) -> list[list[int]]:
    """Lists of token ids of `input`: a string, an array of strings, an array of token ids, or an array of such arrays.
    ApiError 400."""
    limit, most = service.max_context, fields.truncate_prompt_tokens
    most = limit if most == UNTIL_FULL else most
    _, inputs = read_prompts(service, fields.input, fields.add_special_tokens is not False, most, "input", False)
    if (longest := max(map(len, inputs))) > limit:
        problem = f"one has {longest} tokens, more than the context of {limit}"
        raise wrong_field("input", problem, "context_length_exceeded")
    return inputs


def _answer(generation: Generation, fields):
    """The response object, whose vectors are made one by one."""
    requests = generation.requests
    encoded = _as_base64 if fields.encoding_format == "base64" else lambda vector: vector.tolist()
    pools = [request.pool for request in requests if isinstance(request.pool, Pool)]
    vectors = [pool.embedding(fields.normalize is not False) for pool in pools]
    data = ([dict(object="embedding", index=i, embedding=encoded(vector))] for i, vector in enumerate(vectors))
    count = sum(len(request.prompt_ids) for request in requests)
    return dict(
        object="list",
        data=Parts(data),
        model=generation.model_name,
        **generation.service.fingerprint_field,
        usage=dict(prompt_tokens=count, total_tokens=count),
    )


def _as_base64(vector):
    """A vector as base64 of its float32 values, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
