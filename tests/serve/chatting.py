"""Shared by tests of the conversation routes: servers whose model gives the answer that a test chooses."""

import contextlib
import dataclasses

import numpy as np

from lockstep import LLM
from lockstep.text.conversation import ChatModel
from tests.serve.server import SIZES, running

HELLO = [{"role": "user", "content": "hello"}]
POINT = dict(
    type="object",
    required=["x", "side"],
    additionalProperties=False,
    properties=dict(x=dict(type="integer", minimum=0, maximum=99), side=dict(enum=["left", "right"])),
)
PLOT = dict(name="plot", description="Plots a point.", parameters=POINT)
# a template with tools and thoughts, as in Qwen's
THINKING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% elif enable_thinking is defined %}<think>
{% endif %}{% endif %}"""


class Script:
    """A logits mask that allows only the tokens of one text."""

    def __init__(self, llm, text):
        self._ids = [*llm.tokenizer.encode(text, add_special_tokens=False), min(llm.tokenizer.eos_ids)]
        self._words = np.zeros(-(-llm.model.config.vocab_size // 32), np.uint32)

    def __call__(self, output_ids):
        token = self._ids[len(output_ids)]
        self._words[:] = 0
        self._words[token // 32] = 1 << token % 32
        return self._words


def with_template(llm, template):
    """Gives an LLM another chat template (None: no template), before a server is started with it."""
    templates = {} if template is None else {"default": template}
    llm.__dict__["tokenizer"] = dataclasses.replace(llm.tokenizer, chat_templates=templates)
    return llm


@contextlib.contextmanager
def talking(template, **options):
    """A running server of the bundled model with another chat template. options: of the LLM."""
    with running(with_template(LLM(**SIZES, **options), template)) as server:
        yield server


@contextlib.contextmanager
def saying(server, text):
    """A context in which every answer of a conversation route is this text."""
    before = ChatModel.mask
    ChatModel.mask = lambda *_: Script(server.service.llm, text)
    try:
        yield
    finally:
        ChatModel.mask = before
