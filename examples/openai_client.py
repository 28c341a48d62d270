"""Use the official OpenAI client with a moejax server (pip install openai).

python examples/openai_client.py http://127.0.0.1:8000/v1
"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name three colours."}],
    stream=True,
    max_tokens=32,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
