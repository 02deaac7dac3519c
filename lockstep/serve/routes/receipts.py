"""/v1/receipts/verify: whether the answer of a receipt is this model's, bit for bit."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any

from pydantic import Field
from starlette.routing import Route

from lockstep.receipts.envelope import RECEIPT, Envelope, from_object
from lockstep.receipts.identity import difference
from lockstep.receipts.keys import MAX_KEY_CHARS, SigningKey, public_key
from lockstep.receipts.statement import SALT_BYTES, from_bytes, salt_of
from lockstep.receipts.verdict import FALSE, TRUE, Verdict, false
from lockstep.receipts.verify import Given, Verification
from lockstep.replicas.fleet import Fleet
from lockstep.serve.answers.json_response import json_response, to_json
from lockstep.serve.fields.body import Items, Whole
from lockstep.serve.fields.known import OnlyFields
from lockstep.serve.fields.prompts import check_ids
from lockstep.serve.generation import Generation, GenerationEndpoint
from lockstep.serve.receipts.asked import with_request
from lockstep.serve.service import Service

WORDS = {TRUE: "true", FALSE: "false"}


class VerifyFields(OnlyFields):
    """The body of a request. request: the body that was sent for the answer; prompt_token_ids, token_ids: of prompt and
    answer; salt: of a hidden prompt: what the receipt leaves out. key: a public key, PEM text, that has to have signed
    it."""

    model: str | None = None
    receipt: dict
    request: dict | None = None
    prompt_token_ids: Items[Whole] | None = None
    token_ids: Items[Whole] | None = None
    salt: Annotated[str, Field(max_length=2 * SALT_BYTES)] | None = None
    key: Annotated[str, Field(max_length=MAX_KEY_CHARS)] | None = None


def routes(service: Service):
    async def verify(generation: Generation):
        fields = await generation.read(VerifyFields)
        service.check_content()
        envelope = await generation.offload(from_object, fields.receipt, [RECEIPT])
        signatures = await generation.offload(_signatures, envelope, service.receipts.key, fields.key)
        begun = _begin, generation, fields, envelope, signatures
        verification = await service.offload(*begun, workers=service.receipts.workers)
        if isinstance(verification, Future):  # a replica does it
            verification = await asyncio.wrap_future(verification)
        generation.raise_if_ended()
        if isinstance(verification, Verdict):
            return json_response(_shown(verification, signatures))
        if verification.request is not None:
            await generation.run(verification.request)
        return json_response(_shown(await generation.offload(verification.finish), signatures))

    return [Route("/v1/receipts/verify", GenerationEndpoint(service, verify), methods=["POST"])]


def _signatures(envelope: Envelope, own: SigningKey | None, key: str | None) -> dict[str, str]:
    """{id of a key: whether its signature is "valid", "invalid" or "not_checked"}: checked are that of the client's key
    and that of the server's own."""
    made = {each.key_id: "not_checked" for each in envelope.signatures}
    known = [] if own is None else [own.public]
    if key is not None:
        known.append(public_key(key))
        made.setdefault(known[-1].id, "invalid")
    for public in known:
        if public.id in made:
            made[public.id] = "valid" if envelope.is_signed_by(public) else "invalid"
    return made


def _begin(
    generation: Generation, fields: VerifyFields, envelope: Envelope, signatures: dict[str, str]
) -> "Verification | Verdict | Future[Verdict]":
    service, statement = generation.service, from_bytes(envelope.payload)
    unsigned = next((key for key, state in signatures.items() if state == "invalid"), None)
    if unsigned is not None:
        return false("signature", None, None, f"the receipt is not signed by key {unsigned}")
    given: Given | Verdict = Given(
        prompt_ids=_ids(service, fields.prompt_token_ids, "prompt_token_ids"),
        output_ids=_ids(service, fields.token_ids, "token_ids"),
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


def _ids(service: Service, ids: list[int] | None, name: str) -> list[int] | None:
    return None if ids is None else check_ids(service, ids, name)


def _shown(verdict: Verdict, signatures: dict[str, str]) -> dict[str, Any]:
    """A Verdict as the response object."""
    made: dict[str, Any] = dict(object="receipt.verdict", verdict=WORDS.get(verdict.code, "not_checked"))
    made["signatures"] = [dict(keyid=key, check=state) for key, state in signatures.items()]
    if verdict.is_true:
        return made | dict(text=verdict.text)
    known = dict(what=verdict.what, position=verdict.position, claimed=verdict.claimed, found=verdict.found)
    return made | known | dict(reason=verdict.reason)
