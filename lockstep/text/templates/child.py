"""The worker process that compiles and renders chat templates (see text/job_server.py); chat_template.py asks it.

It imports nothing but jinja2 and the sandbox, so that it starts fast.
"""

import marshal
from collections.abc import Callable

from jinja2 import Template, TemplateError

from lockstep.text.job_server import Order, limit, serve
from lockstep.text.templates.sandbox import Sandbox

MAX_CHARS = 1 << 24  # of a rendered prompt
MAX_CODE_BYTES = 1 << 24  # of a compiled template
MAX_REASON_CHARS = 2000
USUAL = "{% for m in messages %}{{ '<' + m.role + '>' + m['content'] | trim }}{{ m | tojson }}{% endfor %}"


def prepare(_about: Order) -> Callable[[Order], bytes]:
    """The function that answers orders. A usual template is rendered first, so that forked copies find all of jinja2's
    modules and caches loaded."""
    _rendered(_compiled(USUAL), {"messages": [{"role": "user", "content": "Hello."}]})
    return answer


def answer(order: Order) -> bytes:
    """An order's answer: for a template's source its compiled code, for code and variables the rendered text.

    ValueError if the template is not valid, fails or refuses.
    """
    seconds, num_bytes, template, variables = marshal.loads(order)
    limit(seconds, num_bytes)
    try:
        return _answer(template, variables)
    except MemoryError:
        much = f"more than {num_bytes >> 20} MB of memory"
        raise ValueError(f"chat template is nested too deeply, or takes {much}") from None


def _answer(template: str | bytes, variables: dict[str, object] | None) -> bytes:
    try:
        if isinstance(template, str):
            return _compiled(template)
        return _rendered(template, variables or {}).encode("utf-8", "surrogatepass")
    except MemoryError:
        raise
    except RecursionError:
        raise ValueError("chat template is nested too deeply, or calls itself without end") from None
    except Exception as error:  # whatever it is, the template or the conversation is the cause
        is_refusal = isinstance(error, TemplateError) and variables is not None
        problem = "" if is_refusal else " is not valid" if variables is None else " failed"
        raise ValueError(f"chat template{problem}: {str(error)[:MAX_REASON_CHARS]}") from None


def _compiled(source: str) -> bytes:
    code = marshal.dumps(Sandbox().compile(source))
    if len(code) > MAX_CODE_BYTES:
        raise ValueError(f"it is compiled to more than {MAX_CODE_BYTES} bytes")
    return code


def _rendered(code: bytes, variables: dict[str, object]) -> str:
    sandbox, pieces, length = Sandbox(), [], 0
    for piece in Template.from_code(sandbox, marshal.loads(code), sandbox.globals).generate(**variables):
        length += len(piece)
        if length > MAX_CHARS:
            raise ValueError(f"more than {MAX_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    serve(prepare)
