"""Chat templates: a conversation as the prompt text its model was trained on.

Templates come with checkpoints, so they are programs of strangers: they run in jinja2's immutable sandbox,
with the steps, the time and every string bounded (template_sandbox.py). Variables and helpers are those of
apply_chat_template in Hugging Face transformers.
"""

from collections.abc import Mapping, Sequence

from jinja2 import Template, TemplateError

from lockstep.serve.template_sandbox import BoundedSandbox, bound_loops

MAX_TEMPLATE_CHARS = 1 << 20
CUT = "\ufdd0cut here\ufdd0"  # marks a place in what is rendered: noncharacters, which no text has


class ChatTemplate:
    """A compiled template. Raises ValueError if the source is not valid or longer than a million characters."""

    def __init__(self, source: str):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"chat template of {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed")
        sandbox = BoundedSandbox()
        try:
            self._code = sandbox.compile(bound_loops(sandbox.parse(source)))
        except TemplateError as error:
            raise ValueError(f"chat template is not valid: {error}") from None
        except RecursionError:
            raise ValueError("chat template is nested too deeply") from None

    def render(
        self,
        messages: Sequence[Mapping],
        tools: Sequence | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt text. `variables` are the template's own, such as bos_token or enable_thinking.

        Raises ValueError with the template's reason if it refuses the conversation, or if it fails,
        reaches for what the sandbox forbids, or takes too many steps, characters or seconds.
        """
        check_messages(messages)
        sandbox = BoundedSandbox()
        template = Template.from_code(sandbox, self._code, sandbox.globals)
        known = {"messages": messages, "tools": tools, "documents": None}
        try:
            pieces = template.generate(**{**variables, **known, "add_generation_prompt": add_generation_prompt})
            return sandbox.concat(pieces)
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from None
        except (RecursionError, MemoryError) as error:
            raise ValueError(f"chat template: {type(error).__name__} while rendering") from None
        except (TypeError, LookupError, ArithmeticError, AttributeError, ValueError) as error:
            raise ValueError(f"chat template failed: {error}") from None


def apply_chat_template(
    template: str,
    messages: Sequence[Mapping],
    tools: Sequence | None = None,
    add_generation_prompt: bool = True,
    **variables: object,
) -> str:
    """Compile and render in one go; see ChatTemplate."""
    return ChatTemplate(template).render(messages, tools, add_generation_prompt, **variables)


def check_messages(messages: Sequence[Mapping]) -> None:
    """Raise ValueError unless `messages` is a list of objects that each have a role."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} must be an object with a role, got {message!r:.80}")
