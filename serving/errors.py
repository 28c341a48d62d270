"""Every error a caller can see, with its gRPC and HTTP status as attributes.

MoejaxError
├── InvalidRequest            INVALID_ARGUMENT    400
│   └── PromptTooLong         INVALID_ARGUMENT    400
├── UnknownRequest            NOT_FOUND           404
├── QueueFull                 RESOURCE_EXHAUSTED  429
├── NoCapacity                UNAVAILABLE         503
├── Draining                  UNAVAILABLE         503
├── DeadlineExceeded          DEADLINE_EXCEEDED   408
├── Cancelled                 CANCELLED           499
├── Unauthenticated           UNAUTHENTICATED     401
├── NotPermitted              PERMISSION_DENIED   403
├── StartError                FAILED_PRECONDITION 500
└── Internal                  INTERNAL            500
"""

from typing import ClassVar


class MoejaxError(Exception):
    """Base of all errors that cross the wire. `retry_after_s` is a hint, or None."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(MoejaxError):
    """The request cannot be served as it is; `param` names the field."""

    grpc_status, http_status, openai_type = "INVALID_ARGUMENT", 400, "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """The prompt does not fit in the context."""


class UnknownRequest(MoejaxError):
    """No request or route of that name."""

    grpc_status, http_status, openai_type = "NOT_FOUND", 404, "invalid_request_error"


class QueueFull(MoejaxError):
    """The queue is at its bound: come back later."""

    grpc_status, http_status, openai_type = "RESOURCE_EXHAUSTED", 429, "rate_limit_error"


class NoCapacity(MoejaxError):
    """No plan can serve with the ranks alive; says what is missing."""

    grpc_status, http_status = "UNAVAILABLE", 503


class Draining(MoejaxError):
    """The server is shutting down and takes no new requests."""

    grpc_status, http_status = "UNAVAILABLE", 503


class DeadlineExceeded(MoejaxError):
    """The request's deadline passed before it was done."""

    grpc_status, http_status = "DEADLINE_EXCEEDED", 408


class Cancelled(MoejaxError):
    """The caller went away or aborted the request."""

    grpc_status, http_status = "CANCELLED", 499


class Unauthenticated(MoejaxError):
    """The call has no API key, or one that is not known."""

    grpc_status, http_status, openai_type = "UNAUTHENTICATED", 401, "authentication_error"


class NotPermitted(MoejaxError):
    """The server was not started with what this call needs (for example --chaos)."""

    grpc_status, http_status, openai_type = "PERMISSION_DENIED", 403, "permission_error"


class StartError(MoejaxError):
    """A process of the server could not start: names which and why."""

    grpc_status, http_status = "FAILED_PRECONDITION", 500


class Internal(MoejaxError):
    """A defect of ours."""
