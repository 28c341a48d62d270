"""The errors that a caller can see, with their gRPC and HTTP statuses as attributes.

MoejaxError
├── InvalidRequest            INVALID_ARGUMENT    400
│   ├── PromptTooLong         INVALID_ARGUMENT    400
│   └── NoTokenAllowed        INVALID_ARGUMENT    400
├── UnknownRequest            NOT_FOUND           404
├── QueueFull                 RESOURCE_EXHAUSTED  429
├── Conflict                  ALREADY_EXISTS      409
├── NoCapacity                UNAVAILABLE         503
├── Draining                  UNAVAILABLE         503
├── DeadlineExceeded          DEADLINE_EXCEEDED   408
├── Cancelled                 CANCELLED           499
├── Unauthenticated           UNAUTHENTICATED     401
├── NotPermitted              PERMISSION_DENIED   403
├── StartError                FAILED_PRECONDITION 500
├── PoisonRequest             ABORTED             500
├── Unreachable               UNAVAILABLE         503
└── Internal                  INTERNAL            500
"""

from typing import ClassVar


class MoejaxError(Exception):
    """Base class of all errors that a client receives. `param` names the field at fault. `retry_after_s` says after how
    many seconds a retry makes sense, or None."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(MoejaxError):
    """The request is not valid. `param` names the field."""

    grpc_status, http_status, openai_type = "INVALID_ARGUMENT", 400, "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the answer that is asked for, do not fit into the context of the model."""


class NoTokenAllowed(InvalidRequest):
    """No token is left that the logit bias, `min_tokens` and the structured output of the request all allow."""


class UnknownRequest(MoejaxError):
    """No request, model or rank has that name."""

    grpc_status, http_status, openai_type = "NOT_FOUND", 404, "invalid_request_error"


class QueueFull(MoejaxError):
    """The queue has no room for another request. Retry later."""

    grpc_status, http_status, openai_type = "RESOURCE_EXHAUSTED", 429, "rate_limit_error"


class Conflict(MoejaxError):
    """Another instruction is being carried out that excludes this one."""

    grpc_status, http_status, openai_type = "ALREADY_EXISTS", 409, "invalid_request_error"


class NoCapacity(MoejaxError):
    """No plan can serve with the ranks that are alive. The message says what is missing."""

    grpc_status, http_status = "UNAVAILABLE", 503


class Draining(MoejaxError):
    """The server is shutting down and accepts no new requests."""

    grpc_status, http_status = "UNAVAILABLE", 503


class DeadlineExceeded(MoejaxError):
    """The deadline of the request passed before its end."""

    grpc_status, http_status = "DEADLINE_EXCEEDED", 408


class Cancelled(MoejaxError):
    """The caller disconnected or aborted the request."""

    grpc_status, http_status = "CANCELLED", 499


class Unauthenticated(MoejaxError):
    """The call has no API key, or an unknown one."""

    grpc_status, http_status, openai_type = "UNAUTHENTICATED", 401, "authentication_error"


class NotPermitted(MoejaxError):
    """The API key or the settings of the server (for example no --chaos) do not permit this call."""

    grpc_status, http_status, openai_type = "PERMISSION_DENIED", 403, "permission_error"


class StartError(MoejaxError):
    """A process of the server could not start. The message says which one, and why."""

    grpc_status, http_status = "FAILED_PRECONDITION", 500


def missing_extra(what: str, package: str | None, extra: str) -> StartError:
    """The error of a start that needs a package of an optional part of moejax, with the command that installs it."""
    return StartError(f"{what} needs {package}. Run in the checkout of moejax: .venv/bin/pip install -e '.[{extra}]'")


class PoisonRequest(MoejaxError):
    """Ranks failed of themselves whenever this request ran, the last one while it ran alone. It is not run again, here
    or by another front; the server's log and its events say how the ranks failed."""

    grpc_status, http_status = "ABORTED", 500


class Unreachable(MoejaxError):
    """No server answers at the address, or the connection broke. Only a client raises it."""

    grpc_status, http_status = "UNAVAILABLE", 503


class Internal(MoejaxError):
    """A defect of the server."""
