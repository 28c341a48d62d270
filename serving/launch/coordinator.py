"""The coordination service of one generation, in a process of its own (`moejax.coordinator`)."""

import asyncio
import sys

from serving.errors import StartError

LOOPBACK = "127.0.0.1"


class Coordinator:
    """The process that hosts one generation's coordination service."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    @classmethod
    async def start(cls, ranks: int, seats: int, host: str = LOOPBACK) -> "Coordinator":
        """Start the service for so many ranks, and seats in all, on an address of this machine. Raises StartError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "moejax.coordinator",
            str(ranks),
            str(seats),
            host,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line.strip().isdigit():
            raise StartError(f"the coordinator did not start: it ended with code {await process.wait()}")
        # Ranks elsewhere know the front by a name of their own; the service is at the same one.
        return cls(process, f"{'' if host != LOOPBACK else host}:{int(line)}")

    async def stop(self) -> None:
        """End the service at once."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
