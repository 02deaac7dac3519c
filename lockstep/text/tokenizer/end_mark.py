"""The mark with which a chat template ends what the assistant says, found out by trying it.

Fine-tunes often take over the end token of their base model, which then is another than that of their chat format: an
answer would go on into the next turn.
"""

from typing import TYPE_CHECKING

from lockstep.text.templates.chat_template import CUT

if TYPE_CHECKING:
    from lockstep.text.tokenizer.tokenizer import Tokenizer


def end_mark(tokenizer: "Tokenizer") -> int | None:
    """The added token that the chat template writes right after an assistant's text; None where it writes none."""
    if not tokenizer.has_chat_template:
        return None
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": CUT}]
    try:
        after = tokenizer.render_chat(messages, add_generation_prompt=False).partition(CUT)[2].lstrip()
    except ValueError:  # the template may want what only a real conversation has
        return None
    added = tokenizer.backend.get_added_tokens_decoder().items()
    found = [(len(token.content), token_id) for token_id, token in added if after.startswith(token.content)]
    return max(found)[1] if found else None
