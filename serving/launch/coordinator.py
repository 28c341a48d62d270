"""The process that hosts the JAX coordination service of one generation (`moejax.runtime.coordinator`)."""

import asyncio
import sys

from serving.errors import StartError

LOOPBACK = "127.0.0.1"


class Coordinator:
    """A running coordination service. `address` is host:port, with an empty host for the front's own machine."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    @classmethod
    async def start(cls, ranks: int, process_ids: int, host: str = LOOPBACK) -> "Coordinator":
        """Start the service on an address of this machine, for `ranks` processes that join at once and `process_ids` in
        all: the others are stood in for, and each is free for a rank, but process 0. Raises StartError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "moejax.runtime.coordinator",
            str(ranks),
            str(process_ids),
            host,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line.strip().isdigit():
            raise StartError(f"the coordinator did not start: it ended with code {await process.wait()}")
        # Ranks on other hosts reach the front by a name that only they know; the service is at the same one.
        return cls(process, f"{'' if host != LOOPBACK else host}:{int(line)}")

    async def stop(self) -> None:
        """Kill the service."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
