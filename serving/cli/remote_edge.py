"""The command `moejax edge`: an edge on another host than the front."""

import click

from serving.cli.front_connection import FrontConnection, front_connection
from serving.cli.options import SettingsCommand, example, settings_options
from serving.config import Settings

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


@click.command(cls=SettingsCommand, short_help="Hold connections of clients for a front on another host.")
@front_connection("front", "--edge-listen", "edge", "prompts, answers and the token")
@click.option(
    "--model", help="Folder with the tokenizer of the model on this host.  [default: the same as on the front]"
)
@settings_options(SETTINGS)
@example(
    "moejax edge --front front.example:50053 --token-file token --ca ca.pem --host 0.0.0.0 --api-keys keys.json",
    "moejax edge --front 127.0.0.1:50053 --token-file token --http-port 8001 --grpc-port 50061",
)
def edge(settings: Settings, connection: FrontConnection, model: str | None) -> None:
    """Serve clients for the front at HOST:PORT until Ctrl-C: this process holds their connections, the front computes.

    A front that dies is a pause for them, and this edge waits for the next one. Each setting comes from its flag, else
    from the environment (MOEJAX_HTTP_PORT and so on), else from the file --config. Settings that decide what an answer
    is are the front's.
    """
    from serving.edges.front_dialer import RemoteFront  # here, as no other command needs the surfaces
    from serving.remote_edge import serve

    tls = connection.tls
    dialer = RemoteFront(connection.address, connection.secret, None if tls is None else tls.context())
    raise SystemExit(serve(settings, dialer, model))
