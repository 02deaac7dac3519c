"""/v1/receipts/verify: whether the answer of a receipt is this model's, bit for bit."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any

from pydantic import Field
from starlette.routing import Route

from lockstep.receipts.envelope import RECEIPT, from_object
from lockstep.receipts.identity import difference
from lockstep.receipts.statement import SALT_BYTES, from_bytes, salt_of
from lockstep.receipts.verdict import FALSE, TRUE, Verdict
from lockstep.receipts.verify import Given, Verification
from lockstep.replicas.fleet import Fleet
from lockstep.serve.answers.json_response import json_response, to_json
from lockstep.serve.fields.body import Fields, Items, Whole
from lockstep.serve.fields.prompts import check_ids
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.receipts.asked import with_request
from lockstep.serve.service import Service

WORDS = {TRUE: "true", FALSE: "false"}


class VerifyFields(Fields):
    """The body of a request. request: the body that was sent for the answer; prompt_token_ids, token_ids: of prompt and
    answer; salt: of a hidden prompt: what the receipt leaves out."""

    model: str | None = None
    receipt: dict
    request: dict | None = None
    prompt_token_ids: Items[Whole] | None = None
    token_ids: Items[Whole] | None = None
    salt: Annotated[str, Field(max_length=2 * SALT_BYTES)] | None = None


def routes(service: Service):
    async def verify(generation: Generation):
        fields = await generation.read(VerifyFields)
        service.check_content()
        verification = await generation.offload(_begin, generation, fields)
        if isinstance(verification, Future):  # a replica does it
            verification = await asyncio.wrap_future(verification)
        if isinstance(verification, Verdict):
            return json_response(_shown(verification))
        if verification.request is not None:
            await generation.run(verification.request)
        return json_response(_shown(await generation.offload(verification.finish)))

    return [Route("/v1/receipts/verify", GenerationEndpoint(service, verify), methods=["POST"])]


def _begin(generation: Generation, fields: VerifyFields) -> "Verification | Verdict | Future[Verdict]":
    service = generation.service
    statement = from_bytes(from_object(fields.receipt, [RECEIPT]).payload)
    given: Given | Verdict = Given(
        prompt_ids=fields.prompt_token_ids and check_ids(service, fields.prompt_token_ids, "prompt_token_ids"),
        output_ids=None if fields.token_ids is None else check_ids(service, fields.token_ids, "token_ids"),
        salt=None if fields.salt is None else salt_of(fields.salt),
    )
    is_of_model = difference(statement.numerics, statement.model, service.receipts.model()) is None
    if fields.request is not None and is_of_model:
        given = with_request(service.loaded, service.chat, to_json(fields.request), statement, given)
    if isinstance(given, Verdict):
        return given
    salt = service.salt(generation.scope["lockstep.tenant"], "")
    if isinstance(service.engine, Fleet):
        return service.engine.verify(statement, given, salt)
    return service.receipts.verifier().begin(statement, given, salt)


def _shown(verdict: Verdict) -> dict[str, Any]:
    """A Verdict as the response object."""
    made: dict[str, Any] = dict(object="receipt.verdict", verdict=WORDS.get(verdict.code, "not_checked"))
    if verdict.is_true:
        return made | dict(text=verdict.text)
    known = dict(what=verdict.what, position=verdict.position, claimed=verdict.claimed, found=verdict.found)
    return made | known | dict(reason=verdict.reason)
