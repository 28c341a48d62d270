"""Other people's programs against a server with real ranks: the official OpenAI client, Node's gRPC, curl, a Prometheus
parser; and two that send whatever may be sent. Afterwards nothing is left running, and it still serves."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import grpc
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from clients.__main__ import run_trials, where
from clients.tool import tools
from serving.api.client import Client
from serving.errors import NotPermitted
from serving.server import Server
from tests.e2e.conftest import PAIR, TINY
from tests.serving.observability.test_metrics import VLLM_NAMES
from tests.support.grpc_requests import BYTES_OF_A_REQUEST
from tests.support.node import node
from tests.support.published_assets import node_modules
from tests.support.streams import wait_until

PROMPT, TOKENS = "ROMEO:", 12


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, a journal, and nothing that lets a caller change the server."""
    journal = tmp_path_factory.mktemp("journal")
    with Server(**PAIR, journal=str(journal)) as server:
        yield server


@pytest.fixture
def client(open_server: Server) -> Iterator[Client]:
    with Client(open_server) as client:
        yield client
        wait_until(lambda: (client.status().running, client.status().waiting) == (0, 0), "no request is left")
        assert [rank.state for rank in client.status().ranks] == ["serving", "serving"]


@pytest.fixture
def text(client: Client) -> str:
    """The results that every client must get."""
    return client.generate(PROMPT, max_tokens=TOKENS, temperature=0).text


def test_the_openai_client_gets_the_text_whole_and_in_pieces(open_server: Server, text: str) -> None:
    with openai.OpenAI(base_url=f"{open_server.url}/v1", api_key="none", max_retries=0) as caller:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        whole = caller.completions.create(**asked)
        assert whole.choices[0].text == text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == TOKENS
        pieces = caller.completions.create(**asked, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text
        with pytest.raises(openai.BadRequestError):
            caller.completions.create(**asked | {"max_tokens": -2})


@pytest.mark.parametrize("key", ["openai_python", "anthropic_python"])
def test_the_trials_of_clients_that_are_installed_here_work(open_server: Server, client: Client, key: str) -> None:
    (tool,) = (tool for tool in tools() if tool.key == key)
    outcomes = run_trials(tool, [sys.executable, "-m", f"clients.tools.{key}"], where(open_server, TINY))
    assert len(outcomes) >= 5
    assert [outcome for outcome in outcomes if outcome.result != "works"] == []


def test_curl_gets_the_text_as_events(open_server: Server, text: str) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True})
    command = ["curl", "-sSN", "-H", "Content-Type: application/json", "-d", body, f"{open_server.url}/v1/completions"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    events = [line.rpartition("data: ")[2] for line in lines if "data: " in line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == text


def test_nodes_client_gets_an_answer_and_the_status(open_server: Server, client: Client) -> None:
    node_modules()
    done = node(open_server.address, PROMPT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["alive"] == 2


def test_a_prometheus_parser_counts_what_was_generated(open_server: Server, client: Client, text: str) -> None:
    def generated() -> float:
        with urllib.request.urlopen(f"{open_server.url}/metrics") as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
        assert families.keys() >= VLLM_NAMES
        return families["vllm:generation_tokens"].samples[0].value

    before = generated()
    client.generate(PROMPT, max_tokens=TOKENS, temperature=0)
    assert generated() == before + TOKENS


def test_a_server_that_lets_nobody_operate_it_says_so(client: Client) -> None:
    with pytest.raises(NotPermitted, match="--operate"):
        client.apply("pause")


def test_no_request_of_the_document_makes_the_server_fail(open_server: Server, client: Client) -> None:
    schema = schemathesis.openapi.from_url(f"{open_server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [each for each in operations if not each.path.endswith("/events")]  # a stream without an end

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(data=st.data())
    def fuzz(data: st.DataObject) -> None:
        case = data.draw(st.sampled_from(operations)).as_strategy()
        answer = data.draw(case).call(timeout=60, stream=False)
        assert answer.status_code < 500, answer.text

    fuzz()


def test_no_bytes_make_the_server_fail(open_server: Server, client: Client) -> None:
    refusals = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    with grpc.insecure_channel(open_server.address) as channel:
        generate = channel.unary_stream("/moejax.v1.Inference/Generate")

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(BYTES_OF_A_REQUEST)
        def fuzz(request: bytes) -> None:
            call = generate(request, timeout=60)
            try:
                assert list(call)
            except grpc.RpcError:
                assert call.code() in refusals

        fuzz()
    assert client.generate(PROMPT, max_tokens=2).reason == "length"
