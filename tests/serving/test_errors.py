"""Every error has a status on every surface, and comes back as itself."""

import json
import re

import grpc
import pytest
from starlette.requests import Request

from serving import errors
from serving.api.grpc import errors as grpc_errors
from serving.api.http.errors import moejax_error

REQUEST = Request({"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""})
CLASSES = sorted(grpc_errors.error_classes(), key=lambda k: k.__name__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda k: k.__name__)
def test_an_error_crosses_grpc_unchanged(kind):
    sent = kind("what, and the way out", param="top_p", retry_after_s=1.5)
    code, text, trailers = grpc_errors.error_to_status(sent)
    assert code is grpc.StatusCode[kind.grpc_status]
    back = grpc_errors.error_from_status(code, text, trailers)
    assert type(back) is kind
    assert (str(back), back.param, back.retry_after_s) == (str(sent), "top_p", 1.5)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", CLASSES, ids=lambda k: k.__name__)
async def test_an_error_has_its_http_status_and_openai_shape(kind):
    response = await moejax_error(REQUEST, kind("text", param="seed", retry_after_s=1.5))
    body = json.loads(response.body)["error"]
    assert response.status_code == kind.http_status
    assert body["message"] == "text"
    assert body["type"] == kind.openai_type
    assert body["param"] == "seed"
    assert response.headers["retry-after"] == "2"


@pytest.mark.anyio
async def test_what_may_be_tried_again_says_when():
    assert (await moejax_error(REQUEST, errors.NoCapacity("x"))).headers["retry-after"] == "1"
    assert "retry-after" not in (await moejax_error(REQUEST, errors.InvalidRequest("x"))).headers


@pytest.mark.parametrize("kind", CLASSES, ids=lambda k: k.__name__)
def test_client_faults_and_server_faults_agree_on_both_surfaces(kind):
    clients = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"}
    clients |= {"CANCELLED", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "ALREADY_EXISTS"}
    assert (kind.grpc_status in clients) == (400 <= kind.http_status < 500)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda k: k.__name__)
def test_the_tree_in_the_docstring_has_the_parent_and_the_statuses_of_each_error(kind):
    if kind is errors.MoejaxError or kind.__module__ != errors.__name__:
        return
    (line,) = re.findall(rf"^(.*)── {kind.__name__} +(\w+) +(\d+)$", errors.__doc__, re.MULTILINE)
    depth, grpc_status, http_status = line
    assert (grpc_status, int(http_status)) == (kind.grpc_status, kind.http_status)
    assert len(depth) // 4 == len(kind.__mro__) - len(errors.MoejaxError.__mro__) - 1


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = set(re.findall(r"\w+Error|(?<=── )\w+", errors.__doc__))
    assert drawn == {k.__name__ for k in CLASSES if k.__module__ == errors.__name__}


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "connection refused", errors.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "", errors.Cancelled),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "Received message larger than max (5 vs. 4)",
            errors.InvalidRequest,
        ),
        (grpc.StatusCode.UNKNOWN, "", errors.Internal),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", errors.Internal),
    ],
)
def test_a_status_of_grpc_itself_is_an_error_too(code, text, kind):
    error = grpc_errors.error_from_status(code, text, None)
    assert type(error) is kind
    assert str(error)


def test_a_long_message_is_cut_to_fit_in_a_header():
    _, text, _ = grpc_errors.error_to_status(errors.Internal("x" * 100_000))
    assert len(text) == 1000
