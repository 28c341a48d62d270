"""The command `moejax edge`: an edge on another host than the front."""

from pathlib import Path

import click

from serving.auth.join_tokens import read_secret
from serving.auth.tls import ClientTls
from serving.cli.hosts import token_file_option
from serving.cli.options import SettingsCommand, example, settings_options
from serving.config import Settings, is_address, is_loopback, split_address
from serving.edges.front_dialer import RemoteFront
from serving.errors import InvalidRequest
from serving.remote_edge import serve

SETTINGS = (
    "host",
    "grpc_port",
    "http_port",
    "vllm_grpc",
    "allowed_origins",
    "root_path",
    "grace_s",
    "api_keys",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "max_body_bytes",
    "max_header_bytes",
    "max_streams",
    "slow_client_s",
    "log_format",
    "log_level",
    "otlp_endpoint",
)
"""The settings of `moejax serve` that an edge has itself. Settings that decide what an answer is are the front's."""

_pem = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(cls=SettingsCommand, short_help="Hold connections of clients for a front on another host.")
@click.option(
    "--front", required=True, metavar="HOST:PORT", help="Address on which the front listens for edges (--edge-listen)."
)
@token_file_option
@click.option(
    "--model", help="Folder with the tokenizer of the model on this host.  [default: the same as on the front]"
)
@click.option("--ca", type=_pem, envvar="MOEJAX_CA", help="Use TLS to the front and trust this authority (PEM).")
@click.option(
    "--cert", type=_pem, envvar="MOEJAX_CLIENT_CERT", help="Certificate that this edge presents to the front (PEM)."
)
@click.option("--key", type=_pem, envvar="MOEJAX_CLIENT_KEY", help="Private key of --cert (PEM).")
@click.option("--plaintext", is_flag=True, help="Connect to the front over a network without TLS.")
@settings_options(SETTINGS)
@example(
    "moejax edge --front front.example:50053 --token-file token --ca ca.pem --host 0.0.0.0 --api-keys keys.json",
    "moejax edge --front 127.0.0.1:50053 --token-file token --http-port 8001 --grpc-port 50061",
)
def edge(
    settings: Settings,
    front: str,
    token_file: Path,
    model: str | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    plaintext: bool,
) -> None:
    """Serve clients for the front at HOST:PORT until Ctrl-C: this process holds their connections, the front computes.

    A front that dies is a pause for them, and this edge waits for the next one. Each setting comes from its flag, else
    from the environment (MOEJAX_HTTP_PORT and so on), else from the file --config. Settings that decide what an answer
    is are the front's.
    """
    if not is_address(front):
        raise InvalidRequest(f"--front is {front!r}; it must be HOST:PORT.", param="front")
    tls = ClientTls(ca=ca, cert=cert, key=key) if ca or cert or key else None
    if tls is None and not plaintext and not is_loopback(split_address(front)[0]):
        raise InvalidRequest(
            f"the connection to {front} would be without TLS, and others on the network could read prompts, answers "
            "and the token. Give --ca, or --plaintext on a private network.",
            param="ca",
        )
    dialer = RemoteFront(front, read_secret(token_file), None if tls is None else tls.context())
    raise SystemExit(serve(settings, dialer, model))
