"""Small chat templates with the marks of Gemma's, Mistral's, Granite's and Phi-4-mini's own, and models of them."""

from dataclasses import dataclass

from tokenizers import AddedToken

from lockstep.text.conversation import ChatModel
from lockstep.text.reasoning import Marks
from lockstep.text.tokenizer.tokenizer import Tokenizer
from lockstep.text.tool_calls.styles import Style
from tests.text.vocabularies import byte_level

# Values as Gemma writes them; DELIMITER stands for the mark around a string.
VALUES = """{%- macro written(v) -%}
  {%- if v is string -%}DELIMITER{{ v }}DELIMITER
  {%- elif v is mapping -%}
    {{- "{" }}{% for k, each in v.items() %}{{ "," if not loop.first }}{{ k }}:{{ written(each) }}{% endfor %}{{ "}" -}}
  {%- elif v is iterable -%}
    {{- "[" }}{% for each in v %}{{ "," if not loop.first }}{{ written(each) }}{% endfor %}{{ "]" -}}
  {%- else -%}{{ v | tojson }}
  {%- endif -%}
{%- endmacro -%}
"""
GEMMA = (
    VALUES.replace("DELIMITER", '<|"|>')
    + """{%- if tools or enable_thinking or messages[0].role == "system" -%}
  <|turn>system
{{ "<|think|>" if enable_thinking }}{{ messages[0].content if messages[0].role == "system" }}
  {%- for tool in tools or [] %}<|tool>{{ tool.function.name }}{{ written(tool.function) }}<tool|>{% endfor -%}
  <turn|>
{% endif -%}
{%- for m in messages if m.role != "system" -%}
  <|turn>{{ "model" if m.role == "assistant" else m.role }}
{% if m.reasoning_content and m.tool_calls %}<|channel>thought
{{ m.reasoning_content }}<channel|>{% endif -%}
  {%- for c in m.tool_calls or [] -%}
    <|tool_call>call:{{ c.function.name }}{{ written(c.function.arguments) }}<tool_call|>
  {%- endfor -%}
  {{ m.content }}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}<|turn>model
{{ "" if enable_thinking else "<|channel>thought\n<channel|>" }}{% endif -%}"""
)
FUNCTION_GEMMA = (
    VALUES.replace("DELIMITER", "<escape>")
    + """{%- for tool in tools or [] -%}
  <start_function_declaration>{{ written(tool.function) }}<end_function_declaration>
{%- endfor -%}
{%- for m in messages -%}
  <start_of_turn>{{ "model" if m.role == "assistant" else m.role }}
{{ m.content }}
  {%- for c in m.tool_calls or [] -%}
    <start_function_call>call:{{ c.function.name }}{{ written(c.function.arguments) }}<end_function_call>
  {%- endfor -%}
  <end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}"""
)
MISTRAL = """{%- for tool in tools or [] -%}[AVAILABLE_TOOLS]{{ tool | tojson }}[/AVAILABLE_TOOLS]{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == "user" -%}[INST]{{ m.content }}[/INST]
  {%- elif m.role == "system" -%}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]
  {%- elif m.role == "tool" -%}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
  {%- elif m.content is string -%}{{ m.content }}
  {%- else -%}
    {%- for block in m.content or [] -%}
      {{- block.text if block.type == "text" else "[THINK]" + block.thinking + "[/THINK]" -}}
    {%- endfor -%}
  {%- endif -%}
  {%- for c in m.tool_calls or [] -%}
    [TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}
  {%- endfor -%}
  {{- "</s>" if m.role == "assistant" -}}
{%- endfor -%}"""
SEED = """{%- for tool in tools or [] -%}
  <seed:bos>system
{{ tool.function | tojson }}<seed:eos>
{%- endfor -%}
{%- for m in messages -%}
  <seed:bos>{{ m.role }}
{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}{{ m.content }}
  {%- for c in m.tool_calls or [] -%}
    {{ "\n<seed:tool_call>\n<function=" + c.function.name }}>
{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>{{ v }}</parameter>
{% endfor %}</function>
</seed:tool_call>
  {%- endfor -%}
  <seed:eos>
{%- endfor -%}
{%- if add_generation_prompt -%}<seed:bos>assistant
{% if thinking_budget == 0 %}<seed:think><seed:cot_budget_reflect>
{% endif %}{% endif -%}"""
GRANITE = """{%- if tools -%}
  <|start_of_role|>system<|end_of_role|>Call tools with <|tool_call|> and a list.<|end_of_text|>
<|start_of_role|>tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>
{% endif -%}
{%- if thinking -%}
  <|start_of_role|>control<|end_of_role|><think></think> and then <response></response><|end_of_text|>
{% endif -%}
{%- for m in messages -%}
  <|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>
{% endfor -%}
{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{% endif -%}"""
PHI = """{%- for m in messages -%}
  <|{{ m.role }}|>{{ m.content }}{% if m.tools %}<|tool|>{{ m.tools }}<|/tool|>{% endif %}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{% endif -%}"""


@dataclass(frozen=True)
class Family:
    """A family of models: a tokenizer with its special tokens, and what is expected to be seen in its template."""

    template: str
    special: tuple[str, ...]
    style: Style
    marks: Marks | None

    def model(self) -> tuple[Tokenizer, ChatModel]:
        """A tokenizer, whose token 0, <|end|>, ends answers, and a ChatModel."""
        backend = byte_level()
        backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in self.special])
        tokenizer = Tokenizer(backend, frozenset({0}), None, {}, {"default": self.template})
        return tokenizer, ChatModel(tokenizer, {0}, tokenizer.vocab_size)
