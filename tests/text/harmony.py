"""A chat template of Harmony's channels, shaped like gpt-oss's own: one call a message, thoughts only before calls."""

TEMPLATE = """<|start|>system<|message|>You are a large language model.
Reasoning: {{ reasoning_effort or "medium" }}<|end|>
{%- for m in messages if m.role in ("system", "developer") %}
  {%- if not loop.first %}{{ raise_exception("one system message") }}{% endif %}
  {{- "<|start|>developer<|message|># Instructions\\n\\n" + m.content + "<|end|>" }}
{%- endfor %}
{%- if tools %}
  {{- "<|start|>developer<|message|># Tools\\n\\nnamespace functions {\\n" }}
  {%- for tool in tools %}
    {{- "type " + tool.function.name + " = (_: " + (tool.function.parameters | tojson) + ") => any;\\n" }}
  {%- endfor %}
  {{- "}<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for m in messages %}
  {%- if m.role == "assistant" %}
    {%- if "content" in m and "<|channel|>" in m.content %}{{ raise_exception("marks in a text") }}{% endif %}
    {%- if "thinking" in m and "<|channel|>" in m.thinking %}{{ raise_exception("marks in a thought") }}{% endif %}
    {%- if m.tool_calls %}
      {%- if m.content and m.thinking %}{{ raise_exception("both content and thinking") }}{% endif %}
      {%- if m.content or m.thinking %}
        {{- "<|start|>assistant<|channel|>analysis<|message|>" + (m.content or m.thinking) + "<|end|>" }}
      {%- endif %}
      {%- set call = m.tool_calls[0].function %}
      {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
      {{- (call.arguments | tojson) + "<|call|>" }}
      {%- set last.name = call.name %}
    {%- else %}
      {%- set end = "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" %}
      {{- "<|start|>assistant<|channel|>final<|message|>" + m.content + end }}
    {%- endif %}
  {%- elif m.role == "tool" %}
    {%- if last.name is none %}{{ raise_exception("no call before") }}{% endif %}
    {{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" }}
    {{- (m.content | tojson) + "<|end|>" }}
  {%- elif m.role == "user" %}
    {{- "<|start|>user<|message|>" + m.content + "<|end|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}"""
MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
