"""The tools of a request, tool_choice, and texts that explain tools to models whose chat template does not."""

import json
import re
from dataclasses import dataclass, replace

from lockstep.text.grammars.schemas import NOTES, check_size

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
MAX_TOOLS = 256
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. parameters: the JSON schema of its arguments; strict: every keyword of that
    schema is enforced or refused."""

    name: str
    description: str
    parameters: dict
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"tools: a name has 1 to 128 letters, digits or _.:-, got {self.name!r:.80}")
        if not isinstance(self.parameters, dict):
            raise ValueError(f"tools: parameters of {self.name}: expected a JSON schema, got {self.parameters!r:.80}")
        check_size(self.parameters, f"tools: parameters of {self.name}")
        if "object" not in (kinds if isinstance(kinds := self.parameters.get("type") or "object", list) else [kinds]):
            raise ValueError(f"tools: parameters of {self.name}: expected a schema of type object, got {kinds!r:.80}")

    @property
    def arguments(self) -> dict:
        """`parameters` with type object. An empty `properties` with no other keyword allows only {}."""
        stated = {word: value for word, value in self.parameters.items() if word not in NOTES and value != []}
        is_empty = stated in ({"properties": {}}, {"properties": {}, "type": "object"})
        return {**self.parameters, "type": "object"} | ({"additionalProperties": False} if is_empty else {})

    def without_schema(self) -> "Tool":
        """The same tool, with a schema that allows any object."""
        return replace(self, parameters={"type": "object"})

    def for_template(self):
        """The tool in the form of OpenAI's API, as chat templates expect it."""
        function = dict(name=self.name, description=self.description, parameters=self.parameters)
        return dict(type="function", function=function)


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request, and how the model may use them.

    must_call: the answer must be a call. allowed: the names of the tools that may be called; None: all. parallel: an
    answer may have several calls.
    """

    tools: tuple[Tool, ...] = ()
    must_call: bool = False
    allowed: tuple[str, ...] | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(names) > MAX_TOOLS:
            raise ValueError(f"tools: expected at most {MAX_TOOLS}, got {len(names)}")
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"tools: {sorted(twice)[0]} is there more than once")
        unknown = set(self.allowed or ()) - set(names)
        if unknown:
            raise ValueError(f"tool_choice: there is no tool {sorted(unknown)[0]!r:.100}")
        if self.must_call and not names:
            raise ValueError("tool_choice: a call is required, but there are no tools")

    @property
    def callable(self):
        """The tools that may be called."""
        return [tool for tool in self.tools if self.allowed is None or tool.name in self.allowed]


# Instructions for models whose chat template shows tools but no format of calls. They teach Hermes' style.
HOW_TO_CALL = """To call one, write its name and arguments as JSON:
<tool_call>
{"name": NAME, "arguments": {...}}
</tool_call>"""


def written_out(use) -> str:
    """Instructions for models whose chat template does not show tools: the tools, and how to call in Hermes' style."""
    listed = "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in use.tools)
    return f"You can call functions. These are their signatures:\n<tools>\n{listed}\n</tools>\n{HOW_TO_CALL}"
