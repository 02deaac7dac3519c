"""The token with which a chat template ends the assistant's turn, found by rendering a probe.

Fine-tunes often keep the end token of their base model in their config, though their chat format ends a turn with
another token. Without that token among the end tokens, an answer would continue into the next turn.
"""

from typing import TYPE_CHECKING

from lockstep.text.templates.chat_template import CUT

if TYPE_CHECKING:
    from lockstep.text.tokenizer.tokenizer import Tokenizer


RETURN, CALL, CHANNEL, END = "<|return|>", "<|call|>", "<|channel|>", "<|end|>"
# Gemma's marks of a call, and of the result of a call, which is not the model's to write.
RESULTS = {"<|tool_call>": "<|tool_response>", "<start_function_call>": "<start_function_response>"}


def with_call_ends(tokenizer: "Tokenizer") -> frozenset[int]:
    """The end tokens of a tokenizer, also those that come behind a call. In Harmony's channels an answer does not end
    with each of its messages; in Gemma's turns it ends where the result of a call begins."""
    added = {token.content: token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()}
    if {RETURN, CALL, CHANNEL} <= added.keys():
        return tokenizer.eos_ids - {added.get(END)} | {added[RETURN], added[CALL]}
    return tokenizer.eos_ids | {added[end] for call, end in RESULTS.items() if {call, end} <= added.keys()}


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
