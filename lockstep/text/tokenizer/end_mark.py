"""The token with which a chat template ends the assistant's turn, found by rendering a probe.

Fine-tunes often keep the end token of their base model in their config, though their chat format ends a turn with
another token. Without that token among the end tokens, an answer would continue into the next turn.
"""

from typing import TYPE_CHECKING

from lockstep.text.templates.chat_template import CUT

if TYPE_CHECKING:
    from lockstep.text.tokenizer.tokenizer import Tokenizer


RETURN, CALL, CHANNEL, END = "<|return|>", "<|call|>", "<|channel|>", "<|end|>"


def with_channel_ends(tokenizer: "Tokenizer") -> frozenset[int]:
    """The end tokens of a tokenizer. If it is one of Harmony's channels, an answer ends with a call, too, and not with
    each of its messages."""
    added = {token.content: token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()}
    if not {RETURN, CALL, CHANNEL} <= added.keys():
        return tokenizer.eos_ids
    return tokenizer.eos_ids - {added.get(END)} | {added[RETURN], added[CALL]}


def end_mark(tokenizer: "Tokenizer") -> int | None:
    """The added token that the chat template writes right after an assistant's text; None where it writes none."""
    if not tokenizer.has_chat_template:
        return None
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": CUT}]
    try:
        after = tokenizer.render_chat(messages, add_generation_prompt=False).partition(CUT)[2].lstrip()
    except ValueError:  # the template may refuse the probe conversation
        return None
    added = tokenizer.backend.get_added_tokens_decoder().items()
    matching = [(len(token.content), token_id) for token_id, token in added if after.startswith(token.content)]
    return max(matching)[1] if matching else None
