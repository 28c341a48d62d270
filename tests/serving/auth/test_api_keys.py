"""API keys: what the file holds, and who gets in on either surface."""

import json
import stat

import grpc
import grpc.aio
import httpx
import pytest
from click.testing import CliRunner
from google.protobuf import message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.api.client import AsyncClient
from serving.auth.api_keys import ApiKeyFile, ApiKeyFileError
from serving.auth.limits import CallLimits
from serving.cli import main
from serving.config import Settings
from serving.errors import InvalidRequest, NotPermitted, Unauthenticated
from serving.proto.moejax.v1 import resilience_pb2
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path):
    return tmp_path / "private" / "keys.json"


def limits_of(file) -> CallLimits:
    return CallLimits.of(Settings(api_keys=str(file)))


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_a_secret_is_not_in_the_file_and_the_file_is_its_owners(file):
    secret = ApiKeyFile(file).add("alice")
    assert secret not in file.read_text()
    assert secret.removeprefix("mjx_") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_key_is_found_by_its_secret_alone(file):
    keys = ApiKeyFile(file)
    secrets = {name: keys.add(name) for name in ("a", "b")}
    assert {name: keys.find(secret).name for name, secret in secrets.items()} == {"a": "a", "b": "b"}
    for wrong in ("", "mjx_", secrets["a"][:-1], secrets["a"] + "x", keys.entries()[0].sha256, "é\udcff"):
        assert keys.find(wrong) is None


def test_a_running_server_notices_added_and_removed_keys(file):
    ApiKeyFile(file).add("a")
    running = ApiKeyFile.open(file)
    secret = ApiKeyFile(file).add("b")
    assert running.find(secret).name == "b"
    ApiKeyFile(file).remove("b")
    assert running.find(secret) is None


def test_keys_survive_a_file_that_breaks_under_a_running_server(file):
    secret = ApiKeyFile(file).add("a")
    running = ApiKeyFile.open(file)
    file.write_text("{")
    assert running.find(secret).name == "a"


@pytest.mark.parametrize("text", ["", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"nam": "a", "sha256": ""}]}'])
def test_a_file_that_is_none_of_ours_is_refused(file, text):
    file.parent.mkdir()
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ApiKeyFileError, match="no key file"):
        limits_of(file)


def test_a_file_that_others_can_write_is_refused(file):
    ApiKeyFile(file).add("a")
    file.chmod(0o620)
    with pytest.raises(ApiKeyFileError, match="chmod 600"):
        limits_of(file)


def test_a_missing_file_says_how_to_make_one(file):
    with pytest.raises(ApiKeyFileError, match="moejax keys add"):
        limits_of(file)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\n"])
def test_a_name_that_cannot_stand_in_a_log_is_refused(file, name):
    with pytest.raises(InvalidRequest):
        ApiKeyFile(file).add(name)


def test_the_commands_add_list_and_remove(file):
    def run(*arguments: str):
        return CliRunner().invoke(main.main, ["keys", *arguments], env={"MOEJAX_API_KEYS": str(file)})

    secret = run("add", "alice", "--admin").output.strip()
    assert ApiKeyFile(file).find(secret).admin
    assert run("add", "alice").exit_code == 1
    assert run("list").output.split()[::3] == ["alice", "admin"]
    assert run("remove", "bob").exit_code == 1
    assert run("remove", "alice").exit_code == 0
    assert json.loads(file.read_text()) == {"keys": []}


async def test_http_wants_a_key_for_all_but_probes_metrics_and_the_page(file):
    secret = ApiKeyFile(file).add("a")
    async with serve(FakeBackend(), limits=limits_of(file)) as server, httpx.AsyncClient(base_url=server.url) as client:
        for path in ("/live", "/health", "/metrics", "/version", "/", "/dashboard.js"):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/fault_tolerance/status", "/fault_tolerance/events", "/v1/nothing"):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert answer.json()["error"]["type"] == "authentication_error"
        body = {"prompt": "a", "max_tokens": 1}
        for wrong in ({}, bearer("x"), {"Authorization": secret}, {"Authorization": f"Basic {secret}"}):
            assert (await client.post("/v1/completions", json=body, headers=wrong)).status_code == 401
        assert server.backend.requests == []
        answer = await client.post("/v1/completions", json=body, headers=bearer(secret))
        assert answer.json()["choices"][0]["text"] == "b"


async def test_killing_takes_an_admin_key_and_chaos(file):
    keys, backend = ApiKeyFile(file), FakeBackend()
    plain, admin = keys.add("a"), keys.add("b", admin=True)
    async with serve(backend, limits=limits_of(file)) as server, httpx.AsyncClient(base_url=server.url) as client:
        for secret, status in ((plain, 403), (admin, 200)):
            answer = await client.post("/fault_tolerance/kill", json={"rank": 1}, headers=bearer(secret))
            assert answer.status_code == status
        async with AsyncClient(server.address, api_key=plain) as caller:
            with pytest.raises(NotPermitted, match="--admin"):
                await caller.kill(2)
        async with AsyncClient(server.address, api_key=admin) as caller:
            await caller.kill(2)
            backend.chaos = False
            with pytest.raises(NotPermitted, match="--chaos"):
                await caller.kill(3)
    assert backend.killed == [(1, "SIGKILL"), (2, "SIGKILL")]


METHODS = list(resilience_pb2.DESCRIPTOR.services_by_name["Resilience"].methods)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
async def test_what_changes_a_server_over_grpc_takes_an_admin_key(file, method):
    secret, backend = ApiKeyFile(file).add("a"), FakeBackend()
    request = message_factory.GetMessageClass(method.input_type)()
    path = f"/{method.containing_service.full_name}/{method.name}"
    async with serve(backend, limits=limits_of(file)) as server, grpc.aio.insecure_channel(server.address) as channel:
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        kind = channel.stream_unary if method.client_streaming else kind
        timeout_s = 0.3 if method.name == "Watch" else 60  # it ends only by its deadline
        metadata = (("authorization", f"Bearer {secret}"),)
        sent = request.SerializeToString()
        call = kind(path)([sent] if method.client_streaming else sent, metadata=metadata, timeout=timeout_s)
        code = await call.code()
    looks = method.name in ("GetStatus", "Watch", "WhatIf")
    assert (code is grpc.StatusCode.PERMISSION_DENIED) == (not looks)
    assert backend.killed == []


async def test_what_is_posted_to_change_a_server_takes_an_admin_key(file):
    secret = ApiKeyFile(file).add("a")
    async with serve(FakeBackend(), limits=limits_of(file)) as server, httpx.AsyncClient(base_url=server.url) as client:
        for name in ("kill", "apply", "report", "whatever"):
            answer = await client.post(f"/fault_tolerance/{name}", json={}, headers=bearer(secret))
            assert answer.status_code == 403, name
            assert "--admin" in answer.json()["error"]["message"]


async def test_grpc_wants_a_key_for_all_but_health_and_reflection(file):
    secret, backend = ApiKeyFile(file).add("a"), FakeBackend()
    async with serve(backend, limits=limits_of(file)) as server:
        async with AsyncClient(server.address) as caller:
            for call in (caller.status, caller.model, lambda: caller.generate("a"), lambda: caller.abort("x")):
                with pytest.raises(Unauthenticated):
                    await call()
            with pytest.raises(Unauthenticated):
                await anext(caller.watch())
        async with AsyncClient(server.address, api_key="mjx_wrong") as caller:
            with pytest.raises(Unauthenticated):
                await caller.status()
        async with AsyncClient(server.address, api_key=secret) as caller:
            assert (await caller.generate("a", max_tokens=2)).text == "bc"
        async with grpc.aio.insecure_channel(server.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    assert len(backend.requests) == 1
