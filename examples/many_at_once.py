"""Send thirty-two requests at once over one connection. The server batches them.

python examples/many_at_once.py 127.0.0.1:50051
"""

import asyncio
import sys

from serving import AsyncClient


async def main(address: str) -> None:
    async with AsyncClient(address) as client:
        prompts = [f"{n} times {n} is" for n in range(32)]
        answers = await asyncio.gather(*(client.generate(p, temperature=0, max_tokens=8) for p in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt} -> {answer.text!r}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
