"""Which kinds of messages a chat template can show, found out by rendering probes.

Templates drop or refuse messages that their authors did not think of: tools under their usual name, tool calls, tool
results, a second system message, two user messages in a row. fallbacks.py rewrites the messages a template cannot show.
"""

import json
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from lockstep.text.templates.chat_template import CUT, TooMuch
from lockstep.text.templates.fallbacks import RESPONSES, results_inside
from lockstep.text.tokenizer.tokenizer import TOOL_TEMPLATE
from lockstep.text.tool_calls.events import Arguments, CallStart, partial
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import HERMES, PHI, STYLES, Style, style_of
from lockstep.text.tool_calls.tools import Tool, ToolUse

AMBER, BIRCH, CEDAR = "amberword", "birchword", "cedarword"  # words to look for in a rendered prompt
IN_SYSTEM = "messages[0].tools"
PLACES = dict(type="object", properties=dict(place=dict(type="string")), required=["place"])
PROBE = Tool("probe_place", "Probes a place.", PLACES)


@dataclass(frozen=True)
class Abilities:
    """What a chat template can show. A bool is true if it shows such messages, false if it drops or refuses them.

    system, several_systems, late_systems: a first system message, several of them, one later in the conversation.
    developer: messages of that role beside a system message. several_users, several_assistants: in a row. opening: the
    user's text that must stand before an assistant's message that comes first; None: no such message is needed.
    tools: the name of the template's variable for tools, or IN_SYSTEM if they are a field of the system message; None
    if it has none, or teaches a format of calls that no Style reads: tools, calls and results are then written into the
    text, in the style of Hermes. teaches: the template
    shows the model how to write a call. style: how the model writes calls. calls, several_calls: messages with a tool
    call, with several. beside_calls: the text of a message that has calls, before them. results: tool results.
    inside: results as a field of the message with the calls, and not as well by messages of their own (Gemma 4, at
    first). system_at_results:
    the system message, when a tool result is the last message. after_results: the assistant's text that must stand
    between a tool result and a user message; None: no such message is needed.
    """

    system: bool
    several_systems: bool
    developer: bool
    late_systems: bool
    several_users: bool
    several_assistants: bool
    opening: str | None
    tools: str | None = None
    teaches: bool = False
    style: Style = HERMES
    calls: bool = False
    several_calls: bool = True
    beside_calls: bool = True
    results: bool = False
    inside: bool = False
    system_at_results: bool = True
    after_results: str | None = None


def abilities_of(tokenizer, with_tools: bool = True):
    """The Abilities of a Tokenizer's chat template for conversations with tools, or of the one for those without."""
    probe = _Probe(tokenizer, with_tools)
    user, last = said("user", AMBER), said("user", CEDAR)
    late = [said("system", AMBER), said("user", "Hello."), said("assistant", BIRCH), said("system", CEDAR)]
    return Abilities(
        system=probe.shows([said("system", BIRCH), user]),
        several_systems=probe.shows([said("system", BIRCH), said("system", CEDAR), user]),
        developer="developer" in probe.source and probe.shows([said("system", BIRCH), said("developer", CEDAR), user]),
        late_systems=probe.shows([*late, said("user", "Hello.")]),
        several_users=probe.shows([user, last]),
        several_assistants=probe.shows([user, said("assistant", BIRCH), said("assistant", CEDAR)]),
        opening=probe.first_text("user", [], [said("assistant", BIRCH), last]),
        **probe.about_tools(user, last),
    )


def said(role, text):
    """A message."""
    return dict(role=role, content=text)


class _Probe:
    def __init__(self, tokenizer, with_tools) -> None:
        self._tokenizer, self.source = tokenizer, "\n".join(tokenizer.chat_templates.values())
        self._variable, self._tools, self._is_hopeless = None, [PROBE] if with_tools else [], False
        names = ("tools", "xml_tools", IN_SYSTEM) if "tools" in self.source else ()
        self._variable = next((name for name in names if self._has_variable(name)), None)

    def text(self, messages):
        """The rendered messages; empty if the template refuses them, or has ever reached a limit of time or memory."""
        if self._is_hopeless:
            return ""
        try:
            return render(self._tokenizer, self._variable, messages, self._tools, add_generation_prompt=False)
        except ValueError as error:
            self._is_hopeless = isinstance(error, TooMuch)
            return ""

    def shows(self, messages) -> bool:
        """Whether the rendered prompt has every probe word that is in the messages or their calls."""
        rendered, given = self.text(messages), json.dumps(messages)
        return bool(rendered) and all(word in rendered for word in (AMBER, BIRCH, CEDAR) if word in given)

    def _shows_in_order(self, messages) -> bool:
        """Whether the rendered prompt has AMBER, and after it BIRCH."""
        return BIRCH in self.text(messages).partition(AMBER)[2]

    def _has_results_inside(self, user) -> bool:
        """Whether results that are a field of the message with the calls are shown, other than messages with them."""
        messages = [user, calling(BIRCH), answering(1, CEDAR)]
        inside = results_inside(messages)
        return self.shows(inside) and self.text(inside) != self.text(messages)

    def _has_variable(self, name) -> bool:
        self._variable = name
        return PROBE.name in self.text([said("user", AMBER)])

    def first_text(self, role, before, after):
        """The text of a message of this role that must stand between the messages `before` and `after` for the template
        to show them: empty if that is enough. None if no message is needed, or none helps."""
        tried = ([], [said(role, "")], [said(role, "OK." if role == "assistant" else "Hello.")])
        between = next((between for between in tried if self.shows([*before, *between, *after])), [])
        return between[0]["content"] if between else None

    def about_tools(self, user: dict, last: dict) -> dict[str, Any]:
        """The abilities that have to do with tools."""
        call, style = calling(BIRCH), style_of(self.source) or HERMES
        calls = self.shows([user, call])
        read = next((s for s in (style, *STYLES) if self._reads(s, user, call)), None)
        is_known = style.begin in self.source or (style is PHI and self._variable == IN_SYSTEM)
        teaches = read is not None or (not calls and is_known)
        # a template that is named as the one for tools is used with tools, even if it teaches no format of calls
        is_meant = TOOL_TEMPLATE in self._tokenizer.chat_templates and not calls
        if (self._variable is None and self._tools) or not (teaches or is_meant):
            return {}
        with_call = [user, call if calls else said("assistant", BIRCH)]
        at_results = [said("system", BIRCH), user, calling(CEDAR) if calls else said("assistant", CEDAR), YES]
        two_calls = [user, calling(BIRCH, CEDAR), YES, answering(2, "No.")]
        return dict(
            tools=self._variable,
            teaches=teaches,
            style=read or style if teaches else HERMES,
            calls=calls,
            several_calls=not calls or self.shows(two_calls),
            beside_calls=not calls
            or self._shows_in_order([said("user", "Hello."), calling(BIRCH) | dict(content=AMBER)]),
            results=self.shows([*with_call, answering(1, CEDAR)]),
            inside=calls and RESPONSES in self.source and self._has_results_inside(user),
            system_at_results=self.shows(at_results),
            after_results=self.first_text("assistant", [*with_call, YES], [last]),
        )

    def _reads(self, style, user, call):
        """Whether a style's parser reads the probe call back from the rendered prompt."""
        text, plain = self.text([user, call]), self.text([user, said("assistant", CUT)])
        before = commonprefix([text, plain])  # of texts, not of paths  # noqa: RUF071
        at = len(before) - partial(before, style.begin)
        parser = CallParser(style, ToolUse((PROBE,)))
        events = parser.push(text[at:]) + parser.finish()
        names = [event.name for event in events if isinstance(event, CallStart)]
        arguments = "".join([event.text for event in events if isinstance(event, Arguments)])
        return names == [PROBE.name] and arguments.endswith("}") and json.loads(arguments) == dict(place=BIRCH)


def render(tokenizer, variable, messages, tools, **variables):
    """The text of a prompt. variable: the name under which the template knows tools, IN_SYSTEM or None."""
    if variable == IN_SYSTEM and tools:
        first = [dict(messages[0])] if messages[:1] and messages[0]["role"] == "system" else []
        system = first[0] if first else said("system", "")
        system["tools"] = json.dumps([tool.for_template()["function"] for tool in tools], ensure_ascii=False)
        return tokenizer.render_chat([system, *messages[len(first) :]], **variables)
    if variable == "xml_tools" and tools:
        return tokenizer.render_chat(messages, **variables, xml_tools=[t.for_template()["function"] for t in tools])
    usual = [tool.for_template() for tool in tools] if variable == "tools" and tools else None
    return tokenizer.render_chat(messages, usual, **variables)


def calling(*places):
    """An assistant's message with a call of PROBE for each of these places."""
    calls = [
        dict(id=f"probecal{i}", type="function", function=dict(name=PROBE.name, arguments=dict(place=place)))
        for i, place in enumerate(places, 1)
    ]
    return dict(role="assistant", content="", tool_calls=calls)


def answering(number, text):
    """The tool message with the result of the call of this number."""
    return dict(role="tool", tool_call_id=f"probecal{number}", content=text)


YES = answering(1, "Yes.")
