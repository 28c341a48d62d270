"""TLS and mutual TLS of both surfaces, with real certificates."""

import ssl

import httpx
import pytest
import trustme

from serving.api.client import AsyncClient
from serving.auth.tls import ClientTls, ServerTls
from serving.config import Settings
from serving.errors import InvalidRequest, StartError, Unreachable
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of an authority, a server and a client of it, and of a client of another authority."""
    folder = tmp_path_factory.mktemp("tls")
    ours, theirs = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "ca.pem")
    for name, made in (
        ("server", ours.issue_cert("localhost", "127.0.0.1")),
        ("client", ours.issue_cert("client.test")),
        ("stranger", theirs.issue_cert("client.test")),
    ):
        made.private_key_pem.write_to_path(folder / f"{name}.key")
        for part in made.cert_chain_pems:
            part.write_to_path(folder / f"{name}.pem", append=True)
    return folder


def server_tls(folder, *, mutual: bool) -> ServerTls:
    settings = Settings(
        tls_cert=str(folder / "server.pem"),
        tls_key=str(folder / "server.key"),
        tls_client_ca=str(folder / "ca.pem") if mutual else None,
    )
    made = ServerTls.of(settings)
    assert made is not None
    return made


def https(server, folder, client: str | None = None) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if client:
        context.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    return httpx.AsyncClient(base_url=f"https://127.0.0.1:{server.http_port}", verify=context)


def client_tls(folder, client: str | None = None) -> ClientTls:
    cert, key = (folder / f"{client}.pem", folder / f"{client}.key") if client else (None, None)
    return ClientTls(ca=folder / "ca.pem", cert=cert, key=key)


async def test_both_surfaces_speak_tls_and_nothing_else(folder):
    async with serve(FakeBackend(), tls=server_tls(folder, mutual=False)) as server:
        async with https(server, folder) as client:
            answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert answer.json()["choices"][0]["text"] == "b"
        async with AsyncClient(server.address, tls=client_tls(folder)) as caller:
            assert (await caller.generate("a", max_tokens=2)).text == "bc"
        async with httpx.AsyncClient(base_url=server.url) as plain:
            with pytest.raises(httpx.HTTPError):
                await plain.get("/live")
        async with AsyncClient(server.address) as caller:
            with pytest.raises(Unreachable):
                await caller.status()


@pytest.mark.parametrize("who", [None, "stranger"])
async def test_mutual_tls_lets_in_only_our_clients(folder, who):
    async with serve(FakeBackend(), tls=server_tls(folder, mutual=True)) as server:
        async with https(server, folder, who) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get("/live")
        async with AsyncClient(server.address, tls=client_tls(folder, who)) as caller:
            with pytest.raises(Unreachable):
                await caller.status()
        async with https(server, folder, "client") as client:
            assert (await client.get("/live")).status_code == 200
        async with AsyncClient(server.address, tls=client_tls(folder, "client")) as caller:
            assert (await caller.model()).name == "fake"


@pytest.mark.parametrize(
    ("cert", "key", "ca"),
    [
        ("none.pem", "server.key", None),
        ("server.pem", "client.key", None),
        ("server.key", "server.pem", None),
        ("server.pem", "server.key", "server.key"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_the_start(folder, cert, key, ca):
    settings = Settings(tls_cert=str(folder / cert), tls_key=str(folder / key), tls_client_ca=ca and str(folder / ca))
    with pytest.raises(StartError):
        ServerTls.of(settings)


def test_a_client_certificate_needs_its_key(folder):
    with pytest.raises(InvalidRequest):
        ClientTls(cert=folder / "client.pem")
