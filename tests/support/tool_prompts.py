"""A conversation with tools: the messages, the tools, a call, and a chat template that shows the tools."""

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = 'Sure. <tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
WITH_TOOLS = """{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<|{{ m.role }}|>
{{- m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}
{{- "<|assistant|>" }}"""
