"""Kill a rank in the middle of a stream, and check that the text is the same as without the kill.

moejax serve --model tiny --chaos &
python examples/survive_a_kill.py 127.0.0.1:50051
"""

import sys

from serving import Client, GenerateOptions

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
PROMPT = "Once upon a time"
options: GenerateOptions = {"temperature": 0.8, "seed": 7, "max_tokens": 48}
with Client(address) as client:
    undisturbed = client.generate(PROMPT, **options)

    parts = []
    stream = client.stream(PROMPT, **options)
    for number, chunk in enumerate(stream):
        parts.append(chunk.text)
        if number == 8:
            victim = next(r.id for r in client.status().ranks if r.state == "serving")
            client.kill(victim)
            print(f"killed rank {victim} after {number + 1} tokens")

    assert stream.complete is not None
    print("".join(parts))
    print(f"epochs {stream.complete.epochs}, same text: {''.join(parts) == undisturbed.text}")
