"""Hosts that join a server: their certificates and join token, and a host agent as a process of its own."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import trustme

from serving.auth.join_tokens import JoinTokens
from simulation.hand_model import PREPARED

ROOT = Path(__file__).parents[2]

JOINED_MODEL = dataclasses.replace(PREPARED, config='{"max_context": 96, "layers": 2}', content="0123", numerics="4567")
"""A model that a front and its hosts have prepared alike."""


@dataclasses.dataclass(frozen=True)
class JoinFiles:
    """A folder with the TLS files of an authority, a front and its hosts, and with a join token."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, *names: str) -> "JoinFiles":
        """Make the files for a front that is reached at these names or addresses."""
        ours, theirs = trustme.CA(), trustme.CA()
        ours.cert_pem.write_to_path(folder / "ca.pem")
        theirs.cert_pem.write_to_path(folder / "other-ca.pem")
        for name, made in (
            ("front", ours.issue_cert(*names)),
            ("host", ours.issue_cert("host.test")),
            ("stranger", theirs.issue_cert("host.test")),
        ):
            made.private_key_pem.write_to_path(folder / f"{name}.key")
            for part in made.cert_chain_pems:
                part.write_to_path(folder / f"{name}.pem", append=True)
        files = cls(folder)
        files.write_token("token", files.tokens.add("hosts"))
        return files

    @property
    def tokens(self) -> JoinTokens:
        """The front's file of tokens."""
        return JoinTokens(self.folder / "tokens.json")

    @property
    def secret(self) -> str:
        """The secret of the hosts' join token."""
        return (self.folder / "token").read_text().strip()

    def write_token(self, name: str, secret: str) -> Path:
        """Write a secret to a host's file."""
        path = self.folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secret + "\n")
        return path

    def settings(self, address: str) -> dict[str, str]:
        """Settings of a front that hosts join at this address, with mutual TLS and the token."""
        names = {"cert": "front.pem", "key": "front.key", "client_ca": "ca.pem"}
        tls = {f"rank_tls_{name}": str(self.folder / file) for name, file in names.items()}
        tokens = str(self.folder / "tokens.json")
        return {"launcher": "join", "rank_listen": address, "rank_tokens": tokens} | tls

    def arguments(self) -> list[str]:
        """Arguments of `moejax rank` for a host of this front, without the front's address."""
        files = {"--token-file": "token", "--ca": "ca.pem", "--cert": "host.pem", "--key": "host.key"}
        return [word for flag, file in files.items() for word in (flag, str(self.folder / file))]


@contextlib.contextmanager
def host_agent(
    label: str, front: str, arguments: Sequence[str], *, within: Sequence[str] = ()
) -> Iterator[subprocess.Popen]:
    """Run `moejax rank --join` for one host; `within` is a command that runs it elsewhere, as in a namespace."""
    command = [*within, sys.executable, "-m", "serving", "rank", "--join", front, "--host", label, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_address() -> str:
    """host:port of loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"
