"""One setting: a dataclass field with its default, its help, its choices and its bounds."""

import dataclasses
from typing import Any, ClassVar

from serving.errors import InvalidRequest


def setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    more_than: float | None = None,
    port: bool = False,
) -> Any:
    """A field with its default and its help. The help names the unit of a number."""
    metadata = {"help": text, "choices": choices, "at_least": at_least, "more_than": more_than, "port": port}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """Base of the groups that `Settings` consists of. `title` is the heading of the group in help and documentation."""

    title: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check_fields()
        self.check()

    def check(self) -> None:
        """Check fields of this group against each other. Raises InvalidRequest."""

    def check_fields(self) -> None:
        """Check each field against its choices and bounds. Raises InvalidRequest."""
        for field in dataclasses.fields(self):
            name, value, bounds = field.name, getattr(self, field.name), field.metadata
            if bounds["choices"] and value not in bounds["choices"]:
                raise InvalidRequest(f"{name} is {value!r}. Choose one of {', '.join(bounds['choices'])}.", param=name)
            if bounds["at_least"] is not None and not value >= bounds["at_least"]:
                raise InvalidRequest(f"{name} is {value}; it must be at least {bounds['at_least']}.", param=name)
            if bounds["more_than"] is not None and not value > bounds["more_than"]:
                raise InvalidRequest(f"{name} is {value}. Choose more than {bounds['more_than']}.", param=name)
            if bounds["port"] and not 0 <= value <= 65535:
                raise InvalidRequest(f"{name} is {value}. Choose 0 to 65535.", param=name)


def check_tls(settings: SettingsGroup, prefix: str) -> None:
    """Check that the TLS settings of a prefix are complete. Raises InvalidRequest."""
    names = [f"{prefix}tls_{name}" for name in ("cert", "key", "client_ca")]
    cert, key, ca = (getattr(settings, name) for name in names)
    if (cert is None) != (key is None):
        given, missing = names[:2] if cert else names[1::-1]
        raise InvalidRequest(f"{given} is given without {missing}. TLS needs both.", param=missing)
    if ca is not None and cert is None:
        raise InvalidRequest(
            f"{names[2]} is given without {names[0]} and {names[1]}. Mutual TLS needs all three.", param=names[0]
        )
