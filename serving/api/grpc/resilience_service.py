"""The service moejax.v1.Resilience: the state of the server, its events, and planned changes."""

import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

from serving.api.grpc import resilience_messages as messages
from serving.api.grpc.errors import abort_on_error
from serving.api.grpc.tensor_receiver import receive_tensors
from serving.api.shutdown import Shutdown
from serving.auth.api_keys import CALLER
from serving.errors import InvalidRequest
from serving.launch.version_folders import incoming_folder
from serving.proto.moejax.v1 import resilience_pb2, resilience_pb2_grpc
from serving.protocol.backend import Backend, answered
from serving.protocol.instructions import DeviceError, check_may_operate

SERVICE_NAME = resilience_pb2.DESCRIPTOR.services_by_name["Resilience"].full_name


class ResilienceService(resilience_pb2_grpc.ResilienceServicer):
    """The service over a `Backend`."""

    def __init__(self, backend: Backend, shutdown: Shutdown) -> None:
        self._backend = backend
        self._shutdown = shutdown

    async def GetStatus(self, request: Any, context: Any) -> resilience_pb2.Status:
        """The status of the server."""
        async with abort_on_error(context):
            return messages.status_to_proto(await answered(self._backend.status()))

    async def Watch(self, request: resilience_pb2.WatchRequest, context: Any) -> None:
        """Events with a sequence above `after`: past events first, then new ones until the client leaves."""
        async with abort_on_error(context):
            events = self._shutdown.until(self._backend.watch(request.after))
            async with contextlib.aclosing(events) as items:
                async for event in items:
                    await context.write(messages.event_to_proto(event))

    async def WhatIf(self, request: Any, context: Any) -> resilience_pb2.WhatIfResponse:
        """The predicted cost of losing each rank and each host, and the plan in force."""
        async with abort_on_error(context):
            prospects = map(messages.prospect_to_proto, await answered(self._backend.what_if()))
            deployment = await answered(self._backend.deployment())
            plan = deployment.to_json() if deployment is not None else ""
            return resilience_pb2.WhatIfResponse(prospects=prospects, plan=plan)

    async def Apply(self, request: resilience_pb2.ApplyRequest, context: Any) -> resilience_pb2.ApplyResponse:
        """Make a planned change. Only for callers that may operate the server."""
        async with abort_on_error(context):
            await self._permit(context)
            return await self._applied(await self._backend.apply(messages.instruction_from_proto(request)))

    async def ApplyTensors(self, requests: AsyncIterator[resilience_pb2.TensorPart], context: Any) -> Any:
        """Change tensors of the weights in force. Only for callers that may operate the server."""
        async with abort_on_error(context):
            await self._permit(context)
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "update":
                raise InvalidRequest("the first message must have update, which says what is changed.", param="update")
            update = messages.tensor_update_from_proto(first.update)
            target = await self._backend.begin_tensors(update)
            async with incoming_folder(target.folder) as folder:
                await receive_tensors(requests, target, folder)
                update = dataclasses.replace(update, base_version=target.base_version)
                serving = await self._backend.apply_tensors(update, str(folder))
            return await self._applied(serving)

    async def Report(self, request: resilience_pb2.ReportRequest, context: Any) -> resilience_pb2.ReportResponse:
        """Take the report of a device's error. Only for callers that may operate the server."""
        async with abort_on_error(context):
            await self._permit(context)
            names = ("rank", "level", "code", "message")
            error = DeviceError.from_json({name: getattr(request, name) for name in names})
            response = await answered(self._backend.report(error))
            return resilience_pb2.ReportResponse(action=response.value)

    async def _applied(self, serving: Iterable[int]) -> resilience_pb2.ApplyResponse:
        status = await answered(self._backend.status())
        return resilience_pb2.ApplyResponse(serving=serving, epoch=status.epoch, weights_version=status.weights_version)

    async def _permit(self, context: Any) -> None:
        status = await answered(self._backend.status())
        peer = re.sub(r"^ipv[46]:(%5B|\[)?", "", context.peer())
        check_may_operate(chaos=status.chaos, operable=status.operable, key=CALLER.get(), peer=peer)

    async def Kill(self, request: resilience_pb2.KillRequest, context: Any) -> resilience_pb2.KillResponse:
        """Kill or stop a rank, on a server started with --chaos."""
        async with abort_on_error(context):
            await self._backend.kill(request.rank, request.signal or "SIGKILL", request.host)
            return resilience_pb2.KillResponse()
