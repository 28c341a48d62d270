"""Pages of other sites, and proxies that serve the server under a path."""

import httpx
import pytest

from serving.api.http.server import application
from serving.auth.api_keys import ApiKeyFile
from serving.auth.limits import CallLimits
from serving.config import HttpSettings, Settings
from serving.errors import InvalidRequest

pytestmark = pytest.mark.anyio
SITE = {"Origin": "https://chat.example"}
PREFLIGHT = SITE | {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def client(processor, limits=None, **settings):
    app = application(processor, limits=limits, settings=HttpSettings(**settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def test_no_page_may_call_without_the_setting(processor):
    async with client(processor) as c:
        assert "access-control-allow-origin" not in (await c.get("/v1/models", headers=SITE)).headers
        assert (await c.options("/v1/completions", headers=PREFLIGHT)).status_code == 405


@pytest.mark.parametrize("origins", ["https://chat.example", "*", "https://a.example, https://chat.example"])
async def test_a_page_of_a_named_site_may_call_the_api_but_not_change_the_server(processor, origins):
    async with client(processor, allowed_origins=origins) as c:
        asked = await c.options("/v1/chat/completions", headers=PREFLIGHT)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in ("*", SITE["Origin"])
        read = await c.get("/v1/models", headers=SITE)
        assert "x-request-id" in read.headers["access-control-expose-headers"].lower()
        for path in ("/fault_tolerance/kill", "/fault_tolerance/apply"):
            assert (await c.options(path, headers=PREFLIGHT)).status_code == 405


async def test_a_page_of_another_site_gets_no_permission(processor):
    async with client(processor, allowed_origins="https://a.example") as c:
        assert (await c.options("/v1/completions", headers=PREFLIGHT)).status_code == 400
        assert "access-control-allow-origin" not in (await c.get("/v1/models", headers=SITE)).headers


async def test_a_path_of_a_proxy_is_taken_off_before_keys_are_asked_for(processor, tmp_path):
    ApiKeyFile(tmp_path / "keys.json").add("a")
    limits = CallLimits.of(Settings(api_keys=str(tmp_path / "keys.json")))
    async with client(processor, limits, root_path="/moejax") as c:
        assert (await c.get("/moejax/health")).status_code == (await c.get("/health")).status_code == 200
        assert (await c.get("/moejax/v1/models")).status_code == (await c.get("/v1/models")).status_code == 401
        assert (await c.get("/moejaxx/health")).status_code == 404
        assert (await c.get("/moejax/openapi.json")).json()["servers"] == [{"url": "/moejax"}]


@pytest.mark.parametrize("root_path", ["", "/moejax"])
async def test_a_path_may_come_with_its_host_and_with_slashes_in_a_row(processor, tmp_path, root_path):
    ApiKeyFile(tmp_path / "keys.json").add("a")
    limits = CallLimits.of(Settings(api_keys=str(tmp_path / "keys.json")))
    app = application(processor, limits=limits, settings=HttpSettings(root_path=root_path))
    for target, status in (
        (f"http://server:8000{root_path}/v1/models", 401),
        (f"HTTPS://server{root_path}//v1//models", 401),
        (f"/{root_path}/v1//models", 401),
        (f"http://server{root_path}/live", 200),
        ("http://server", 200),
        ("*", 404),
        ("//server/v1/models", 404),
        ("ftp://server/v1/models", 404),
    ):
        statuses = []

        async def send(message, statuses=statuses):
            statuses.append(message.get("status"))

        scope = {"type": "http", "method": "GET", "path": target, "headers": [], "query_string": b""}
        await app(scope, None, send)
        assert statuses[0] == status, target


@pytest.mark.parametrize("path", ["moejax", "/moejax/", "/"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(InvalidRequest, match="root_path is"):
        HttpSettings(root_path=path)
