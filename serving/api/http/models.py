"""OpenAI's endpoints of models: the one that is served, under each of its names."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from serving.api.http.json_response import json_response
from serving.api.http.openai_objects import Model, ModelList
from serving.config import HttpSettings, listed
from serving.core.request_processor import RequestProcessor
from serving.errors import UnknownRequest
from serving.protocol.backend import Backend, answered


def model_names(backend: Backend, settings: HttpSettings) -> Sequence[str]:
    """The names under which clients may ask for the model."""
    return listed(settings.served_model_name) or (backend.model.name,)


class ModelEndpoints:
    """The endpoints over a `RequestProcessor`."""

    def __init__(self, processor: RequestProcessor, settings: HttpSettings) -> None:
        self._processor = processor
        self._backend = processor.backend
        self._names = model_names(processor.backend, settings)

    async def all(self, _: Request) -> Response:
        """The names of the model."""
        return json_response(ModelList(object="list", data=[await self._model(name) for name in self._names]))

    async def one(self, request: Request) -> Response:
        """The model of that name. Raises UnknownRequest when this server has another."""
        name = request.path_params["name"].removesuffix("/")
        if name not in self._names:
            raise UnknownRequest(f"The model {name!r} does not exist.", param="model")
        return json_response(await self._model(name))

    async def _model(self, name: str) -> Model:
        status = await answered(self._backend.status())
        return Model(
            id=name,
            object="model",
            created=int(status.started_at),
            owned_by="moejax",
            root=self._backend.model.name,
            parent=None,
            max_model_len=self._backend.model.max_context,
            default_sampling_params=self._processor.sampling_defaults,
        )

    async def tokenizer_info(self, _: Request) -> Response:
        """The files that a client needs to load the model's tokenizer: its tokenizer_config.json and chat template."""
        return json_response(self._processor.tokenizer.info)
