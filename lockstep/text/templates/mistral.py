"""Chat templates for Mistral's models whose files have none: one for each version of their tokenizers.

What a template renders has the tokens that mistral-common's instruct tokenizer of that version makes. Two messages of a
user or of the assistant in a row are refused, so that fallbacks.py joins them, as mistral-common does.
Source: src/mistral_common/tokens/tokenizers/instruct.py of github.com/mistralai/mistral-common.
"""

from collections.abc import Sequence

HEAD = """
{%- macro spaced(text) %}{{ SPACE ~ text if text else '' }}{% endmacro %}
{%- macro arguments(call) %}
    {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{%- endmacro %}
{%- set turn = namespace(last='', first_user=-1, last_user=-1, system='') %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set turn.last_user = loop.index0 %}
        {%- set turn.first_user = loop.index0 if turn.first_user < 0 else turn.first_user %}
    {%- endif %}
    {%- if message.role == turn.last and message.role in ('user', 'assistant') %}
        {{- raise_exception('two messages in a row are of the role ' ~ turn.last) }}
    {%- elif message.role == 'assistant' and turn.last == '' %}
        {{- raise_exception('the first message is of the assistant') }}
    {%- elif message.role not in ROLES %}
        {{- raise_exception('messages of the role ' ~ message.role ~ ' are not supported') }}
    {%- endif %}
    {%- set turn.last = message.role %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}"""
TAIL = """
{%- endfor %}"""

# The system message: before the text of a user's message, or between marks of its own.
SYSTEM_BEFORE = """
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('a system message must be the first') }}{% endif %}
        {%- set turn.system = message.content ~ '\\n\\n' %}
    {%- endif %}"""
SYSTEM = """
    {%- if message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' ~ spaced(message.content) ~ '[/SYSTEM_PROMPT]' }}
    {%- endif %}"""

# What a user says, in version 1 between marks that are ordinary text.
SETTINGS = """
    {%- if message.role == 'user' and loop.index0 == turn.first_user %}
        {%- set effort = reasoning_effort or EFFORTS[0] %}
        {%- if effort not in EFFORTS %}
            {{- raise_exception('reasoning_effort: expected one of ' ~ EFFORTS | join(', ') ~ ', got ' ~ effort) }}
        {%- endif %}
        {{- '[MODEL_SETTINGS]{"reasoning_effort": "' ~ effort ~ '"}[/MODEL_SETTINGS]' }}
    {%- endif %}"""
PLAIN_USER = """
    {%- if message.role == 'user' %}
        {%- set before = turn.system if loop.index0 == turn.first_user else '' %}
        {{- SPACE ~ '[INST] ' ~ before ~ message.content ~ ' [/INST]' }}
    {%- endif %}"""
TOOLS = """
    {%- if tools and loop.index0 == turn.FIRST_OR_LAST_user %}
        {{- '[AVAILABLE_TOOLS]' ~ SPACE ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}
    {%- endif %}"""
USER = """
    {%- if message.role == 'user' %}
        {%- set before = turn.system if loop.index0 == turn.last_user else '' %}
        {{- '[INST]' ~ spaced(before ~ message.content) ~ '[/INST]' }}
    {%- endif %}"""

# What the assistant says: thoughts, text, calls.
THOUGHT = """
    {%- if message.role == 'assistant' and message.reasoning_content %}
        {{- '[THINK]' ~ message.reasoning_content ~ '[/THINK]' }}
    {%- endif %}"""
PLAIN_TEXT = """
    {%- if message.role == 'assistant' and message.content %}{{ ' ' ~ message.content }}{% endif %}"""
TEXT = """
    {%- if message.role == 'assistant' and message.content %}{{ spaced(message.content.rstrip(' ')) }}{% endif %}"""
CALLS = """
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '[TOOL_CALLS]' ~ SPACE ~ '[' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": ' ~ call.function.name | tojson ~ ', "arguments": ' ~ arguments(call) }}
            {{- ', "id": ' ~ call.id | tojson ~ '}' ~ ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' }}
    {%- endif %}"""
NAMED_CALLS = """
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '[TOOL_CALLS]' ~ call.function.name CALL_ID ~ '[ARGS]' ~ arguments(call) }}
        {%- endfor %}
    {%- endif %}"""
END = """
    {%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}"""

# What a tool returns.
RESULT_OBJECT = """
    {%- if message.role == 'tool' %}
        {%- set result = {'content': message.content, 'call_id': message.tool_call_id} %}
        {{- '[TOOL_RESULTS]' ~ SPACE ~ result | tojson ~ '[/TOOL_RESULTS]' }}
    {%- endif %}"""
RESULT_OF_CALL = """
    {%- if message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' ~ spaced(message.tool_call_id) ~ '[TOOL_CONTENT]' ~ spaced(message.content) }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}"""
RESULT = """
    {%- if message.role == 'tool' %}{{ '[TOOL_RESULTS]' ~ message.content ~ '[/TOOL_RESULTS]' }}{% endif %}"""

LAST_TOOLS, FIRST_TOOLS = (TOOLS.replace("FIRST_OR_LAST", place) for place in ("last", "first"))
BODIES = {
    "v1": (SYSTEM_BEFORE, PLAIN_USER, PLAIN_TEXT, END),
    "v2": (SYSTEM_BEFORE, USER, TEXT, END),
    "v3": (SYSTEM_BEFORE, LAST_TOOLS, USER, TEXT, CALLS, END, RESULT_OBJECT),
    "v7": (SYSTEM, LAST_TOOLS, USER, TEXT, CALLS, END, RESULT_OF_CALL),
    "v11": (SYSTEM, LAST_TOOLS, USER, TEXT, NAMED_CALLS, END, RESULT_OF_CALL),
    "v13": (SYSTEM, FIRST_TOOLS, USER, TEXT, NAMED_CALLS, END, RESULT),
    "v15": (SYSTEM, FIRST_TOOLS, SETTINGS, USER, TEXT, NAMED_CALLS, END, RESULT),
}


def mistral_template(version: str, spaced: bool, thinks: bool = False, efforts: Sequence[str] = ()) -> str | None:
    """The chat template of a version of Mistral's tokenizers, such as "v3"; None if there is none.

    spaced: a space is written before each text that follows a mark; for SentencePiece, unless its tokenizer adds it.
    thinks: for a vocabulary with marks around thoughts. efforts: the values of reasoning_effort, the usual one first,
    of models that are told it.
    """
    parts = BODIES.get(version)
    if parts is None:
        return None
    if thinks and version in ("v13", "v15"):
        parts = (THOUGHT, *parts)
    body = "".join(part for part in parts if efforts or part is not SETTINGS).replace("EFFORTS", str(list(efforts)))
    roles = ("system", "user", "assistant", *(("tool",) if "[TOOL_RESULTS]" in body else ()))
    call_id = " ~ '[CALL_ID]' ~ call.id" if version == "v11" else ""
    source = (HEAD + body + TAIL).replace("ROLES", str(roles)).replace(" CALL_ID ", f"{call_id} ")
    return source.replace("SPACE", "' '" if spaced else "''").lstrip("\n")
