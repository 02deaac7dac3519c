"""Forged receipts: each function changes an honest one so that what it claims is false; None where it cannot."""

import base64
import copy
import json
import struct
from dataclasses import dataclass, replace

from lockstep.engine.leaves import LEAF_BYTES
from lockstep.receipts.fields import ids_digest
from lockstep.receipts.form import LIBRARY
from lockstep.receipts.merkle import leaf_hashes, root
from lockstep.receipts.statement import TAG_BYTES, Statement

DIGITS = "0123456789abcdef"


@dataclass(frozen=True)
class Honest:
    """An honest receipt's statement, and the leaves of its answer."""

    statement: Statement
    leaves: bytes


def answered(statement, **changes):
    return replace(statement, answer=replace(statement.answer, **changes))


def with_leaves(statement, leaves):
    """The statement of other leaves, with their own tags and root."""
    nodes = leaf_hashes(leaves, LEAF_BYTES)
    tags = None if statement.answer.tags is None else b"".join(node[:TAG_BYTES] for node in nodes)
    return answered(statement, root=root(nodes), tags=tags)


def one_token(honest, draw, vocab_size):
    """A token is another one, in the tree, too."""
    statement, at = honest.statement, draw.randrange(honest.statement.answer.tokens)
    ids = list(statement.answer.ids)
    ids[at] = (ids[at] + draw.randrange(1, vocab_size)) % vocab_size
    leaves = bytearray(honest.leaves)
    leaves[at * LEAF_BYTES : at * LEAF_BYTES + 4] = struct.pack("<I", ids[at])
    return answered(with_leaves(statement, leaves), ids=tuple(ids))


def one_token_of_the_prompt(honest, draw, vocab_size):
    statement, ids = honest.statement, list(honest.statement.prompt.ids)
    at = draw.randrange(len(ids))
    ids[at] = (ids[at] + draw.randrange(1, vocab_size)) % vocab_size
    return replace(statement, prompt=replace(statement.prompt, ids=tuple(ids), digest=ids_digest(ids)))


def order(honest, draw, vocab_size):
    """Two tokens, and their leaves, change places."""
    statement, ids = honest.statement, list(honest.statement.answer.ids)
    pairs = [(i, i + 1) for i in range(len(ids) - 1) if ids[i] != ids[i + 1]]
    if not pairs:
        return None
    i, j = draw.choice(pairs)
    ids[i], ids[j] = ids[j], ids[i]
    leaves = [honest.leaves[at : at + LEAF_BYTES] for at in range(0, len(honest.leaves), LEAF_BYTES)]
    leaves[i], leaves[j] = leaves[j], leaves[i]
    return answered(with_leaves(statement, b"".join(leaves)), ids=tuple(ids))


def in_a_leaf(honest, draw, first, size):
    """One bit of a part of a leaf is another one."""
    leaves, at = bytearray(honest.leaves), draw.randrange(honest.statement.answer.tokens)
    leaves[at * LEAF_BYTES + first + draw.randrange(size)] ^= 1 << draw.randrange(8)
    return with_leaves(honest.statement, leaves)


def logprob_ulp(honest, draw, vocab_size):
    """A log-probability is the float32 beside it."""
    leaves, at = bytearray(honest.leaves), draw.randrange(honest.statement.answer.tokens) * LEAF_BYTES + 4
    [bits] = struct.unpack_from("<I", leaves, at)
    struct.pack_into("<I", leaves, at, bits + draw.choice((-1, 1)))
    return with_leaves(honest.statement, leaves)


def logprob_bit(honest, draw, vocab_size):
    return in_a_leaf(honest, draw, 4, 4)


def digest_bit(honest, draw, vocab_size):
    return in_a_leaf(honest, draw, 8, 32)


def root_bit(honest, draw, vocab_size):
    changed = bytearray(honest.statement.answer.root)
    changed[draw.randrange(32)] ^= 1 << draw.randrange(8)
    return answered(honest.statement, root=bytes(changed))


def finish_reason(honest, draw, vocab_size):
    others = [reason for reason in ("stop", "length", "cancelled") if reason != honest.statement.answer.finish_reason]
    return answered(honest.statement, finish_reason=draw.choice(others))


def cut(honest, draw, vocab_size):
    """The answer ends earlier, and says that it was to."""
    statement, kept = honest.statement, honest.statement.answer.tokens - 1
    if kept < 1 or statement.answer.finish_reason == "cancelled":
        return None
    ids = statement.answer.ids[:kept]
    return answered(with_leaves(statement, honest.leaves[: kept * LEAF_BYTES]), tokens=kept, ids=ids)


def other_hash(text, draw):
    at = draw.randrange(len(text))
    return text[:at] + draw.choice(DIGITS.replace(text[at], "")) + text[at + 1 :]


def of_model(name):
    def changed(honest, draw, vocab_size):
        model = honest.statement.model
        return replace(honest.statement, model=replace(model, **{name: other_hash(getattr(model, name), draw)}))

    return changed


def kv_dtype(honest, draw, vocab_size):
    model = honest.statement.model
    others = [name for name in ("f32", "bf16", "q8") if name != model.kv_dtype]
    return replace(honest.statement, model=replace(model, kv_dtype=draw.choice(others)))


FORGERIES = {
    "token": one_token,
    "prompt": one_token_of_the_prompt,
    "order": order,
    "logprob ulp": logprob_ulp,
    "logprob bit": logprob_bit,
    "digest bit": digest_bit,
    "root bit": root_bit,
    "finish reason": finish_reason,
    "cut answer": cut,
    "other template": of_model("chat_template"),
    "other content": of_model("content"),
    "other weight formats": of_model("formats"),
    "other KV format": kv_dtype,
}


def damaged(statement, draw):
    """The bytes of a statement with a few of its fields replaced, taken out, or exchanged; most are refused."""
    value = json.loads(statement.to_bytes())
    for _ in range(draw.randint(1, 3)):
        places = list(places_in(value))
        holder, name = draw.choice(places)
        kind = draw.random()
        if kind < 0.2:
            del holder[name]
            continue
        other = draw.choice(places)
        holder[name] = copy.deepcopy(other[0].get(other[1])) if kind < 0.4 else draw.choice(ODD)(draw)
    return json.dumps(value).encode()


def places_in(value):
    """(The object, the name) of every field."""
    for name, each in list(value.items()):
        yield value, name
        if isinstance(each, dict):
            yield from places_in(each)


ODD = (
    lambda draw: draw.choice(
        (None, True, -1, 0, 1, 2, 1 << 22, 1 << 31, 1 << 62, "", "x", [], {}, [0], ["a"], "0" * 64)
    ),
    lambda draw: draw.randrange(5000),
    lambda draw: "".join(draw.choice(DIGITS) for _ in range(draw.choice((8, 64)))),
    lambda draw: base64.b64encode(bytes(draw.randrange(256) for _ in range(3 * draw.randrange(40)))).decode(),
    lambda draw: dict(grammar=draw.choice(BOMBS), library=LIBRARY),
    lambda draw: dict(tokens=dict(allowed=[draw.randrange(5000)], banned=[[1, 2]], ends=[0])),
)
BOMBS = (
    "{}",
    "x" * 5000,
    json.dumps({"grammars": [{"lark_grammar": "start: " + " | ".join(f'"{"a" * i}"' for i in range(1, 400))}]}),
    json.dumps({"grammars": [{"lark_grammar": "start: /(a|aa)+(b|bb)+.{1,9999}/"}]}),
    json.dumps({"grammars": [{"lark_grammar": "start: start start"}]}),
    json.dumps({"grammars": [{"json_schema": {"type": "string", "pattern": "(.{0,200}){200}"}}]}),
)
