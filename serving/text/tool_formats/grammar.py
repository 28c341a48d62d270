"""Lark grammars of a tool call, in the dialect of llguidance.

The arguments of each tool are a rule of their own, so that `#` in its schema is the root of that schema.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serving.text.json_schema import with_spacing


def literal(text: str) -> str:
    """The Lark expression of a text."""
    return json.dumps(text, ensure_ascii=False)


def one_call(
    tools: Sequence[Mapping[str, Any]], write: Callable[[str, str], str], before: str = "", after: str = ""
) -> str:
    """The grammar of one call of one of the tools. `write` gets the name of a tool and the rule of its arguments and
    returns the Lark expression of the call; `before` and `after` are expressions around it."""
    rules = [f"start: {before} call {after}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for position, tool in enumerate(tools):
        function = tool["function"]
        schema = with_spacing(function.get("parameters") or {"type": "object"})
        rules.append(f"call_{position}: {write(function['name'], f'arguments_{position}')}")
        rules.append(f"arguments_{position}: %json {json.dumps(schema)}")
    return "\n".join(rules) + "\n"


def json_call(name: str, arguments: str, key: str = "arguments") -> str:
    """The Lark expression of a call as a JSON object; `arguments` is the rule of its arguments."""
    head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
    return f'{literal(head)} {arguments} "}}"'
