"""Stream text from a running server.

moejax serve --model tiny &
python examples/stream.py 127.0.0.1:50051
"""

import sys

from serving import Client

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
with Client(address) as client:
    stream = client.stream("The capital of France is", temperature=0, max_tokens=16)
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    assert stream.complete is not None
    print(f"\n[{stream.complete.reason} after {stream.complete.completion_tokens} tokens]")
