"""Which variable of a chat template switches thinking on and off, and what holds without it."""

import jinja2
import pytest

from lockstep.text.reasoning import ThinkingSwitch, thinking_switch

OPEN = "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
CLOSED = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    "template, switch",
    [
        (CLOSED, ThinkingSwitch("enable_thinking", default=True)),
        (OPEN, ThinkingSwitch("enable_thinking", default=False)),
        ("{{ '<think>' if thinking else '</think>' }}", ThinkingSwitch("thinking", default=False)),
        ("{# enable_thinking #}{{ messages }}{{ 'thinking' }}", None),
    ],
)
def test_the_default_is_what_the_template_does_without_the_variable(template, switch):
    assert thinking_switch(jinja2.Template(template).render) == switch


def test_a_template_that_refuses_has_none():
    def render(**_):
        raise ValueError("roles must alternate")

    assert thinking_switch(render) is None
