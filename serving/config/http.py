"""Settings of the HTTP API: what it is called, who may call it from a browser, how strict it is."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting
from serving.errors import InvalidRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpSettings(SettingsGroup):
    """How the HTTP API treats its clients."""

    title: ClassVar[str] = "HTTP API"

    served_model_name: str | None = setting(
        None,
        "Names under which clients know the model, separated by commas; responses and metrics have the first one. "
        "Default: the model's own name.",
    )
    strict_fields: bool = setting(
        False, "Refuse a request with an unknown field instead of ignoring the field (docs/openai.md)."
    )
    allowed_origins: str | None = setting(
        None,
        "Sites whose pages may call the API from a browser (CORS), separated by commas; * is every site. "
        "Default: none. Paths under /fault_tolerance/ are closed to all of them.",
    )
    root_path: str = setting(
        "", "Path under which a proxy serves this server, such as /moejax; it is taken off the path of a request."
    )

    def check(self) -> None:
        """Check fields of this group. Raises InvalidRequest."""
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRequest(
                f"root_path is {self.root_path!r}; it must begin with a slash and not end with one.", param="root_path"
            )
        if self.served_model_name is not None and not listed(self.served_model_name):
            raise InvalidRequest("served_model_name is empty. Give a name, or leave it out.", param="served_model_name")


def listed(text: str | None) -> tuple[str, ...]:
    """The parts of a setting that are separated by commas."""
    return tuple(name for part in (text or "").split(",") if (name := part.strip()))
