"""Status, events, loss forecasts and instructions as protobuf messages: `x_to_proto` and `x_from_proto`."""

import dataclasses
from typing import Any

from serving.proto.moejax.v1 import resilience_pb2
from serving.protocol.events import Event, severity_of
from serving.protocol.instructions import Instruction
from serving.protocol.status import EdgeStatus, LossCost, LossForecast, PoolStatus, RankStatus, Status
from serving.protocol.tensors import TensorUpdate


def status_to_proto(status: Status) -> resilience_pb2.Status:
    """The message of a server's status."""
    values = {f.name: getattr(status, f.name) for f in dataclasses.fields(status)}
    values["ranks"] = [_rank_to_proto(r) for r in status.ranks]
    values["edges"] = [resilience_pb2.Edge(**dataclasses.asdict(edge)) for edge in status.edges]
    values["pools"] = [resilience_pb2.Pool(**dataclasses.asdict(pool)) for pool in status.pools]
    values["masked"] = [resilience_pb2.MaskedExpert(layer=l, expert=e) for l, e in status.masked]
    values["expert_load"] = [resilience_pb2.ExpertLoad(tokens=row) for row in status.expert_load]
    values["buckets"] = [resilience_pb2.StepShape(decode=rows, tiles=tiles) for rows, tiles in status.buckets]
    return resilience_pb2.Status(**values)


def _rank_to_proto(rank: RankStatus) -> resilience_pb2.Rank:
    values = {f.name: getattr(rank, f.name) for f in dataclasses.fields(rank)}
    values["slots"] = [resilience_pb2.Slots(experts=row) for row in rank.slots]
    values["loss"] = resilience_pb2.LossCost(**dataclasses.asdict(rank.loss)) if rank.loss is not None else None
    return resilience_pb2.Rank(**values)


def status_from_proto(message: resilience_pb2.Status) -> Status:
    """The inverse of `status_to_proto`."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(Status)}
    values["ranks"] = tuple(_rank_from_proto(r) for r in message.ranks)
    values["edges"] = tuple(_edge_from_proto(edge) for edge in message.edges)
    names = [f.name for f in dataclasses.fields(PoolStatus)]
    values["pools"] = tuple(PoolStatus(**{name: getattr(each, name) for name in names}) for each in message.pools)
    values["masked"] = tuple((m.layer, m.expert) for m in message.masked)
    values["expert_load"] = tuple(tuple(row.tokens) for row in message.expert_load)
    values["buckets"] = tuple((shape.decode, shape.tiles) for shape in message.buckets)
    values["axes"], values["lattice"] = (
        dict(sorted(message.axes.items())),
        dict(sorted(message.lattice.items())),
    )
    return Status(**values)


def _edge_from_proto(message: resilience_pb2.Edge) -> EdgeStatus:
    return EdgeStatus(**{field.name: getattr(message, field.name) for field in dataclasses.fields(EdgeStatus)})


def _rank_from_proto(message: resilience_pb2.Rank) -> RankStatus:
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(RankStatus)}
    values["pid"] = message.pid if message.HasField("pid") else None
    values["slots"] = tuple(tuple(s.experts) for s in message.slots)
    values["loss"] = None
    if message.HasField("loss"):
        names = [f.name for f in dataclasses.fields(LossCost)]
        values["loss"] = LossCost(**{name: getattr(message.loss, name) for name in names})
    return RankStatus(**values)


def event_to_proto(event: Event) -> resilience_pb2.Event:
    """The message of an event."""
    values = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
    values["phases"] = [resilience_pb2.Phase(name=n, milliseconds=m) for n, m in event.phases.items()]
    return resilience_pb2.Event(**values)


def event_from_proto(message: resilience_pb2.Event) -> Event:
    """The inverse of `event_to_proto`."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(Event)}
    values["rank"] = message.rank if message.HasField("rank") else None
    values["phases"] = {p.name: p.milliseconds for p in message.phases}
    values["severity"] = message.severity or severity_of(message.kind)  # an older server sends none
    return Event(**values)


def prospect_to_proto(prospect: LossForecast) -> resilience_pb2.Prospect:
    """The message of a loss forecast."""
    return resilience_pb2.Prospect(**dataclasses.asdict(prospect))


def prospect_from_proto(message: resilience_pb2.Prospect) -> LossForecast:
    """The inverse of `prospect_to_proto`."""
    values: dict[str, Any] = {f.name: getattr(message, f.name) for f in dataclasses.fields(LossForecast)}
    values["ranks"] = tuple(message.ranks)
    return LossForecast(**values)


def instruction_to_proto(instruction: Instruction) -> resilience_pb2.ApplyRequest:
    """The message of an instruction."""
    values = {f.name: getattr(instruction, f.name) for f in dataclasses.fields(instruction)}
    return resilience_pb2.ApplyRequest(**{k: v for k, v in values.items() if v is not None})


def tensor_update_to_proto(update: TensorUpdate) -> resilience_pb2.TensorUpdate:
    """The message of an update by changed tensors."""
    return resilience_pb2.TensorUpdate(**dataclasses.asdict(update))


def tensor_update_from_proto(message: resilience_pb2.TensorUpdate) -> TensorUpdate:
    """The inverse of `tensor_update_to_proto`. Raises InvalidRequest."""
    given: dict[str, Any] = {"timeout_s": message.timeout_s} if message.HasField("timeout_s") else {}
    return TensorUpdate(
        version=message.version,
        base_version=message.base_version,
        running=message.running or "switch",  # type: ignore[arg-type] - checked by TensorUpdate
        **given,
    )


def instruction_from_proto(message: resilience_pb2.ApplyRequest) -> Instruction:
    """The inverse of `instruction_to_proto`. Raises InvalidRequest."""
    given: dict[str, Any] = {name: getattr(message, name) for name in ("to", "timeout_s") if message.HasField(name)}
    return Instruction(
        action=message.action,  # type: ignore[arg-type] - checked by Instruction
        ranks=tuple(message.ranks),
        host=message.host,
        replace=message.replace,
        model=message.model,
        version=message.version,
        running=message.running or "switch",  # type: ignore[arg-type] - checked by Instruction
        path=message.path,
        python=message.python,
        **given,
    )
