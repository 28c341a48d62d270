"""The facts by which an edge on another host answers as edges beside the front do, which read them in the run folder.

Settings that decide what an answer is come from the front, so that no two edges can differ in them; an edge's own
settings are those of its host: ports, keys, TLS, limits and logs.
"""

import dataclasses
import socket
from pathlib import Path
from typing import Any, Self

import msgspec

from serving.config import Settings
from serving.errors import StartError
from serving.launch.run_folder import RunFolder
from serving.protocol.prepared_model import PreparedModel
from serving.text.model_files import text_digest
from serving.version import build

SETTINGS = (
    "generation_config",
    "tool_call_parser",
    "reasoning_parser",
    "max_context",
    "served_model_name",
    "strict_fields",
    "max_prompt_tokens",
)
"""The settings of the front that its edges on other hosts have too; `chat_template` travels as a text."""


class ServedModel(msgspec.Struct, kw_only=True):
    """The model that a front serves. `prepared` is its prepared model as JSON, `files` a digest of the files that texts
    are read and written with, `server` the name of the supervisor, `build` the code of the front, and `tensor` the
    number of ranks that split the attention heads among them."""

    prepared: str
    settings: dict[str, Any]
    chat_template: str | None = None
    files: str = ""
    server: str = ""
    build: str = ""
    tensor: int = 1

    @classmethod
    def of(cls, settings: Settings, model: PreparedModel, run: RunFolder) -> Self:
        """The model of a front. Raises StartError when a file of it cannot be read."""
        template = settings.chat_template
        try:
            text = None if template is None else Path(template).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"the chat template {template} cannot be read: {error}.") from None
        return cls(
            prepared=model.to_json(),
            settings={name: getattr(settings, name) for name in SETTINGS},
            chat_template=text,
            files=text_digest(Path(model.folder)),
            server=f"{socket.gethostname()}/{run.path.name}",
            build=build(),
            tensor=settings.tensor,
        )

    def model(self, folder: str | None, scratch: Path) -> tuple[PreparedModel, dict[str, Any]]:
        """The model with the files in `folder`, unless that is where the front has them too, and the settings that an
        edge takes over. A chat template of the front's is written to the folder `scratch`. Raises StartError when the
        files are others than the front's."""
        model = PreparedModel.from_json(self.prepared)
        where = Path(folder or model.folder)
        if not where.is_dir():
            raise StartError(
                f"the front has the tokenizer of {model.name} in {model.folder}, and this host has no folder {where}. "
                "Name the folder of the model on this host with --model."
            )
        found = text_digest(where)
        if found != self.files:
            raise StartError(
                f"{where} holds another tokenizer, chat template or generation_config.json (digest {found}) than the "
                f"front has in {model.folder} ({self.files}): answers would differ. Copy the front's files, or name "
                "their folder on this host with --model."
            )
        values = {name: value for name, value in self.settings.items() if name in SETTINGS}
        if self.chat_template is not None:
            template = scratch / "chat_template.jinja"
            template.write_text(self.chat_template)
            values["chat_template"] = str(template)
        return dataclasses.replace(model, folder=str(where)), values

    def change_to(self, after: "ServedModel") -> str:
        """Why an edge that has begun to serve this model cannot serve the other one of a later front; empty if it
        can."""
        ours, theirs = PreparedModel.from_json(self.prepared), PreparedModel.from_json(after.prepared)
        for what, name in (
            ("model", "name"),
            ("weights", "content"),
            ("configuration", "config"),
            ("format", "weights"),
        ):
            had, has = getattr(ours, name), getattr(theirs, name)
            if had != has:
                shown = f" ({had} before, {has} now)" if len(f"{had}{has}") < 100 else ""
                return f"the front serves another {what} than before{shown}"
        for name in (*SETTINGS, "chat_template", "files"):
            had, has = (each.settings.get(name, getattr(each, name, None)) for each in (self, after))
            if had != has:
                return f"the front has other settings than before: {name}"
        return ""

    def computes_as(self, other: "ServedModel") -> bool:
        """Whether a front of the other one goes on with the answers of this one: it is of the same server, whose
        upgrades see to that, or runs the same code on hosts whose results agree to the last bit, with the same format
        of the cache and the same shards of layers, whose parts are summed one by one."""
        return self.server == other.server or self._arithmetic() == other._arithmetic()

    def _arithmetic(self) -> tuple[object, ...]:
        model = PreparedModel.from_json(self.prepared)
        return self.build, self.tensor, model.numerics, model.cache_format, model.sharded_layers
