"""The document at /openapi.json against the server it describes: whatever is sent, it answers as the document says."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve_in_thread

schemathesis = pytest.importorskip("schemathesis", reason="needs the dev tools")


def test_no_request_of_the_document_makes_the_server_fail_or_leaks():
    backend = FakeBackend(chaos=False)
    with serve_in_thread(backend) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) > 5

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(data=st.data())
        def fuzz(data) -> None:
            operation = data.draw(st.sampled_from(operations))
            if operation.path.endswith("/events"):  # a stream without an end
                return
            case = data.draw(operation.as_strategy())
            answer = case.call(timeout=20, stream=False)
            assert answer.status_code < 500, (case.method, case.path, case.body, answer.text)
            declared = {str(code) for code in operation.definition.raw["responses"]}
            assert str(answer.status_code) in declared or "default" in declared, (case.path, answer.status_code)

        fuzz()
        assert backend.running == 0
