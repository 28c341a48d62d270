"""One rank: a process with one device. It owns weights in slots, cache pages and executables, and decides nothing.

    python -m serving.rank        (started by the front, which tells it the rest by environment and stream)

The main thread obeys commands in order. Another thread receives them, so that an abort is taken while a step hangs
in a collective; a third sends heartbeats; a fourth loads executables beside the steps.
"""

import concurrent.futures
import dataclasses
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import jax
import numpy as np

from moejax import kernels
from moejax.cache import bytes_per_token
from moejax.config import ModelConfig
from moejax.executables import CompileCounter, ExecutableStore
from moejax.inputs import Bucket, idle
from moejax.integrity import damage, inspect, inspect_common
from moejax.model import StepOutputs
from moejax.parity import Shelf, Weights
from moejax.programs import (
    LocalPrograms,
    MeshPrograms,
    ModelShape,
    compile_missing,
    local_lowerings,
    mesh_lowerings,
)
from moejax.published_store import open_store
from moejax.recovery import LiveArrays
from moejax.role_programs import RolePrograms, compile_roles
from moejax.shaping import RowShape, dense
from moejax.shared import Arena
from moejax.transfer import EntryWriter, Written, entries_of, read_entries, rows_by_entry, written
from moejax.world import World, configure_process
from serving.cache_copy import piece_of
from serving.dial import Way
from serving.mesh_key import MeshKey
from serving.orphans import die_with_parent
from serving.page_index import PageIndex
from serving.protector import Protector, restored_rows
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.rank_process import RANK, STAY, TOKEN

HEARTBEAT_S = 0.05
REDIAL_S = 0.05
"""How soon a front that is gone is looked for again."""
EVERY_CONNECT = 1 << 62
"""More connects than a front ever asks for."""
WARM_ROWS = 8
"""Steps of at most so many rows, or else the smallest, are loaded first, and run once before they are needed."""


@dataclasses.dataclass(frozen=True)
class Adopted:
    """The plan a rank is part of: its mesh, and how a step's arguments are made."""

    epoch: int
    mesh: MeshKey
    arguments: Callable[[jax.Array], Any]
    routes: np.ndarray
    mates: tuple[int, ...] = ()


class Rank:
    """The state of a rank between commands."""

    def __init__(self, rank: int, way: Way) -> None:
        self.rank = rank
        self._way = way
        self.compiles = CompileCounter()
        self.world = World()
        self._shape: ModelShape | None = None
        self._executables: ExecutableStore | None = None
        self._arrays: LiveArrays | None = None
        self._shelf: Shelf | None = None
        self._meshes: dict[MeshKey, MeshPrograms | RolePrograms] = {}
        self._local: dict[int, LocalPrograms] = {}
        self._configured: link_pb2.Configure | None = None
        self._adopted: Adopted | None = None
        self._aborted = -1
        self._generation = 0
        self._backend = threading.Lock()
        """Held by whoever loads onto the backend, or makes another of it."""
        self._idle: list[np.ndarray] = []
        self._sampled = 0.0
        self._timeout_s = 0
        self._given_up = 0
        """Connect commands up to this number are void, also those that have not begun: a member is dead."""
        self._protector: Protector | None = None
        self._piece = np.zeros((0, 0), np.uint8)
        """Memory that is there for the entries that are given back at once."""
        self._index = PageIndex()
        self._last = (-1, -1)
        """Epoch and number of the last step."""
        self._chosen: np.ndarray | None = None
        """The tokens it chose, by segment; None when they are void."""
        self._uncopied: tuple[int, int, Written, StepOutputs] | None = None
        """The last step and its bucket, until what it wrote is copied."""

    def abort(self, epoch: int, connecting: int) -> None:
        """Cut the collectives of an epoch, and a communicator that is being connected; or only such a one, if
        `connecting` is its number or a later one. From any thread."""
        self._given_up = max(self._given_up, connecting)
        self.world.give_up_connecting()
        if connecting:
            return
        self._aborted = max(self._aborted, epoch)
        adopted = self._adopted
        if adopted is not None and adopted.epoch <= epoch:
            self.world.abort(adopted.mesh.ranks)

    def hello(self, token: str) -> link_pb2.Report:
        """What a front must know of this rank first."""
        epoch = self._adopted.epoch if self._adopted is not None else 0
        told = link_pb2.Hello(
            pid=os.getpid(),
            token=token,
            epoch=max(epoch, self._aborted, 0),
            generation=self._generation,
            full=self._index.hello(),
            serves=self._adopted is not None,
            cache_copy=protector.path if (protector := self._protector) is not None else "",
        )
        return link_pb2.Report(rank=self.rank, hello=told)

    def forsaken(self) -> None:
        """The front is gone: nothing that it began is waited for, until the next configures this rank. From any
        thread."""
        adopted = self._adopted
        self._given_up = EVERY_CONNECT
        self.abort(adopted.epoch if adopted is not None else 0, 0)

    def configure(self, command: link_pb2.Configure) -> dict[str, Any]:
        """Fix the shapes and read the common weights into host memory; or take a new front's word for the same."""
        told = link_pb2.Configure()
        told.CopyFrom(command)
        told.ClearField("protection")
        told.ClearField("shard")  # that of a new front's first plan; each plan says it anew
        if self._configured is None:
            self._set_up(command)
            self._configured = told
        elif told != self._configured:
            raise RuntimeError("this rank serves another model, or other shapes, than its new front asks for")
        self._protect_as(command)
        self._uncopied, self._given_up = None, 0
        return {"shares_memory": self.shape.shared}

    def _set_up(self, command: link_pb2.Configure) -> None:
        configure_process(command.collective_timeout_s, self._way.address)
        if not any(platform in os.environ.get("JAX_PLATFORMS", "") for platform in ("cuda", "tpu")):
            try:
                kernels.load()
            except kernels.KernelError as error:
                print(f"rank {self.rank}: {error}", file=sys.stderr, flush=True)
        buckets = tuple(Bucket(decode=b.decode, tiles=b.tiles, max_pages=command.max_pages) for b in command.buckets)
        self._shape = ModelShape(
            cfg=ModelConfig.from_json(command.model_config).share(max(1, command.tensor)),
            buckets=buckets,
            page_size=command.page_size,
            pages=command.pages,
            shared=command.one_machine and kernels.active(),
        )
        self._timeout_s = command.collective_timeout_s
        self._executables = ExecutableStore(Path(command.executables))
        store = open_store(Path(command.store))
        self._arrays = LiveArrays(self._shape, store, attends=not command.experts_only, shard=command.shard)
        self._shelf = Shelf(self._arrays)
        self._idle = [idle(bucket) for bucket in buckets]
        self._writer = EntryWriter(self._shape.cfg, buckets)

    def join(self, command: link_pb2.Join) -> dict[str, Any]:
        """Enter a generation with everything held."""
        with self._backend:
            self.arrays.leave_device(command.pages_used)
            self._index.keep(command.pages_used)
            self._meshes, self._local, self._adopted = {}, {}, None
            seats = dict(zip(command.members, command.seats, strict=True))
            self.world.join(self._way.beside_the_front(command.address), self.rank, seats, command.processes)
            self.arrays.enter_device(self.device)
            self._generation = command.generation
        return {}

    def seat(self, command: link_pb2.Seat) -> dict[str, Any]:
        """Learn which process another rank is now."""
        with self._backend:
            self._meshes = {key: mesh for key, mesh in self._meshes.items() if command.rank not in key.ranks}
            self.world.seat(command.rank, command.process)
        return {}

    def hold(self, command: link_pb2.Hold) -> dict[str, Any]:
        """Fill the slots before being part of a plan."""
        slots = np.frombuffer(command.slots, np.int32).reshape(self.shape.cfg.n_moe_layers, command.slots_per_rank)
        filled = self.arrays.fill(slots, self._local.get(command.slots_per_rank), self.device)
        return {"experts_loaded": filled.read}

    def compile(self, command: link_pb2.Compile) -> dict[str, Any]:
        """Compile what a mesh shape needs and the store lacks."""
        devices, slots = self.world.devices(command.mesh.ranks), command.mesh.slots
        if attention := command.mesh.attention:
            compiled = compile_roles(self.executables, self.shape, devices, slots, attention, self.device)
        else:
            compiled = compile_missing(self.executables, mesh_lowerings(self.shape, devices, slots), devices)
        here = [self.device]
        compiled += compile_missing(self.executables, local_lowerings(self.shape, self.device, slots), here)
        return {"compiled": compiled}

    def prepare(self, command: link_pb2.Prepare) -> dict[str, Any]:
        """Load the executables of a mesh: all, or if urgent those of small steps; the others follow on demand."""
        key = MeshKey.read(command.mesh)
        wanted = [i for i, bucket in enumerate(self.shape.buckets) if self._is_small(bucket) or not command.urgent]
        with self._backend:
            generation = self._generation
            if key.slots not in self._local:
                self._local[key.slots] = LocalPrograms(self.shape, self.device, key.slots, self.executables)
            if key not in self._meshes:
                self._meshes[key] = self._programs(key)
        for index in wanted:
            with self._backend:
                if generation == self._generation:
                    self._meshes[key].step(index)
                    if key.attends(self.rank):
                        self._local[key.slots].after_step(index)
        return {}

    def _is_small(self, bucket: Bucket) -> bool:
        return bucket.rows <= max(WARM_ROWS, min(each.rows for each in self.shape.buckets))

    def _programs(self, key: MeshKey) -> MeshPrograms | RolePrograms:
        devices = self.world.devices(key.ranks)
        if not key.attention:
            return MeshPrograms(self.shape, devices, key.slots, self.executables)
        return RolePrograms(self.shape, devices, key.slots, key.attention, self.device, self.executables)

    def connect(self, command: link_pb2.Connect) -> dict[str, Any]:
        """Connect a mesh's communicator, and note which sockets it is made of. Run its small steps once on nothing:
        the first run of a program takes several times as long as the next, and should not be the one after a loss."""
        key = MeshKey.read(command.mesh)
        programs = self._meshes[key]
        with self.world.connecting(key.ranks, self._arena(key, command.exchange)):
            if command.number <= self._given_up:
                raise RuntimeError(f"mesh {key.ranks} was given up before its turn: one of its ranks is lost")
            programs.connect(self.device)
        if command.warm:
            arguments = self._lay(key, np.full(self.arrays.routes_shape, -1, np.int32))
            for index, bucket in enumerate(self.shape.buckets):
                if self._is_small(bucket):
                    packed = jax.device_put(self._idle[index], self.device)
                    nothing = link_pb2.Step(bucket=index)
                    self._finish(programs.step(index)(arguments(packed)), packed, nothing, key)
            if self.arrays.cache is not None and len(self._piece):
                commit = self._commits(key.slots)
                self.arrays.cache = self._writer.warm(self.arrays.cache, len(self._piece), commit, self.device)
        return {}

    def _arena(self, key: MeshKey, path: str) -> Arena | None:
        if not self.shape.shared:
            return None
        n, room = len(key.ranks), self.shape.outbox_bytes(len(key.ranks), key.slots, key.attention)
        return Arena(path, ranks=n, me=key.ranks.index(self.rank), outbox_bytes=room, timeout_s=self._timeout_s)

    def _lay(self, key: MeshKey, routes: np.ndarray, mates: Sequence[int] = ()) -> Callable[[jax.Array], Any]:
        if key.attention:
            return self.arrays.lay_here(routes, self.device)
        return self.arrays.lay_over(self._meshes[key], routes, mates)

    def adopt(self, command: link_pb2.Adopt) -> dict[str, Any]:
        """Take one's part in a plan: hold what its role needs, fill the slots and lay the arrays over its mesh."""
        key = MeshKey.read(command.mesh)
        attends = key.attends(self.rank)
        slots = np.frombuffer(command.slots, np.int32).reshape(self.shape.cfg.n_moe_layers, key.slots_of(self.rank))
        routes = np.full(self.arrays.routes_shape, -1, np.int32)
        if command.expert_to_slot:
            routes = np.frombuffer(command.expert_to_slot, np.int32).reshape(routes.shape)
        mates = tuple(command.mates)
        shard = mates.index(key.ranks.index(self.rank)) if mates else None
        self.arrays.attend(attends, self.device, shard)
        self._index.keep(0)
        if command.WhichOneof("protection") is not None:
            self._protect_as(command)
        filled = self.arrays.fill(slots, self._local[key.slots], self.device)
        arguments = self._lay(key, routes, mates)
        self._adopted = Adopted(command.epoch, key, arguments, routes, mates)
        return {"experts_loaded": filled.read, "missing": _expert_slots(filled.missing), "trouble": filled.trouble}

    def read_cache(self, command: link_pb2.ReadCache) -> dict[str, Any]:
        """Hand over cache entries of a sequence."""
        entries = entries_of(command.pages, self.shape.page_size, command.first, command.count)
        assert self.arrays.cache is not None, "Join comes first"
        return {"rows": read_entries(self.arrays.cache, entries).tobytes()}

    def write_cache(self, command: link_pb2.WriteCache) -> dict[str, Any]:
        """Take over cache entries of a sequence."""
        layers = self.shape.cfg.n_layers
        self._write(command, np.frombuffer(command.rows, np.float32).reshape(layers, command.count, -1))
        return {}

    def restore_cache(self, command: link_pb2.RestoreCache) -> dict[str, Any]:
        """Take over cache entries of a sequence whose rank died."""
        into = self._piece if len(self._piece) >= command.count else None
        rows = restored_rows(command, self.shape.page_size, into).view(np.float32)
        self._write(command, rows.reshape(command.count, self.shape.cfg.n_layers, -1).swapaxes(0, 1))
        return {}

    def read_weights(self, command: link_pb2.ReadWeights) -> dict[str, Any]:
        """Hand over a piece of an expert's weights, or of a parity that is kept here."""
        return self.shelf.read(_weights(command.of), command.first, command.count)._asdict()

    def write_weights(self, command: link_pb2.WriteWeights) -> dict[str, Any]:
        """Take over a piece of a parity, to keep it, or of an expert that was made again."""
        checksums = tuple(command.checksums)
        self.shelf.write(_weights(command.of), command.first, command.size, command.rows, checksums)
        return {}

    def keep_parity(self, command: link_pb2.KeepParity) -> dict[str, Any]:
        """Forget what else is kept of a layer."""
        self.shelf.keep_only(command.layer, [_weights(of) for of in command.parities])
        return {}

    def _write(self, command: link_pb2.WriteCache | link_pb2.RestoreCache, rows: np.ndarray) -> None:
        """Rows `[L, count, widths]` into the cache, and into the copy of it."""
        cache, adopted = self.arrays.cache, self._adopted
        assert cache is not None, "Join comes first"
        assert adopted is not None, "Adopt comes first"
        entries = entries_of(command.pages, self.shape.page_size, command.first, command.count)
        self._index.wrote(entries // self.shape.page_size)
        commit = self._commits(adopted.mesh.slots)
        self.arrays.cache = self._writer.write(cache, entries, rows, commit, self.device)
        if self._protector is not None:
            tokens = np.frombuffer(command.tokens, np.int32)
            positions = np.arange(command.first, command.first + command.count, dtype=np.int32)
            self._protector.copy(entries, tokens, positions, rows.swapaxes(0, 1))

    def _commits(self, slots: int) -> Callable[[int], Callable[..., Any]]:
        """The commit program of each bucket."""
        return lambda index: self._local[slots].after_step(index)[1]

    def _protect_as(self, command: link_pb2.Configure | link_pb2.Adopt) -> None:
        """From now on the cache is copied as the front wants it."""
        before, self._protector = self._protector, Protector.of(command)
        if self._protector is not None and not len(self._piece):
            size = bytes_per_token(self.shape.cfg)
            self._piece = np.full((piece_of(size), size), 0, np.uint8)
        if before is not None:
            before.close()

    def protect(self) -> None:
        """Copy what the last step wrote to where it outlives this rank. After its report, and beside the next step if
        that is there already, so that nobody waits. A rank that cannot serves on without a copy, whose seal then stays
        behind."""
        step, self._uncopied = self._uncopied, None
        if step is None or self._protector is None:
            return
        try:
            self._copy_step(*step)
        except Exception as error:
            self._protector = None
            text = f"rank {self.rank}: the cache is not copied any more: {type(error).__name__}: {error}"
            print(text, file=sys.stderr, flush=True)

    @property
    def runs_beside(self) -> bool:
        """Whether a step that has begun goes on without this thread."""
        return self._adopted is not None and not self._adopted.mesh.attention

    def _copy_step(self, step: int, bucket: int, wrote: Written, outputs: StepOutputs) -> None:
        assert self._protector is not None
        new = jax.tree.map(lambda a: a.addressable_data(0), outputs.new_kv)
        if outputs.written is not None:
            packed, shape = np.asarray(outputs.written.addressable_data(0)), self.shape
            wrote = written(packed, shape.buckets[bucket], shape.pages * shape.page_size)
        self._protector.copy(wrote.entries, wrote.tokens, wrote.positions, rows_by_entry(new, wrote.rows))
        self._protector.seal(step)

    def told(self) -> list[link_pb2.Report]:
        """What the front has not heard of copies."""
        messages = self._protector.told() if self._protector is not None else []
        return [link_pb2.Report(rank=self.rank, copied=message) for message in messages]

    def inspect(self, command: link_pb2.Inspect) -> dict[str, Any]:
        """Compare weights with their checksums."""
        found = inspect(self.arrays, command.first, command.count)
        common = inspect_common(self.arrays) if command.count == 0 else []
        return {"missing": _expert_slots(found), "damaged": bool(common), "trouble": ", ".join(common[:3])}

    def damage(self, command: link_pb2.Damage) -> dict[str, Any]:
        """Spoil a slot. The arrays of the plan in force are laid over its mesh again: their leaves were donated."""
        adopted = self._adopted
        assert adopted is not None, "Adopt comes first"
        local = self._local[adopted.mesh.slots]
        spoilt = damage(self.arrays, command.layer, command.slot, local, self.device, nan=command.nan)
        arguments = self._lay(adopted.mesh, adopted.routes, adopted.mates)
        self._adopted = dataclasses.replace(adopted, arguments=arguments)
        return {"missing": _expert_slots([spoilt])}

    def step(self, command: link_pb2.Step, received: float) -> link_pb2.Report:
        """Run one step and commit it; the report is StepDone, or StepFailed with nothing changed."""
        adopted = self._adopted
        try:
            if adopted is None or adopted.epoch != command.epoch or command.epoch <= self._aborted:
                has = adopted.epoch if adopted else None
                raise StaleEpoch(f"step {command.step} is of epoch {command.epoch}; this rank is in {has}")
            self._index.note(command.full)
            programs = self._meshes[adopted.mesh]
            self.world.use(adopted.mesh.ranks)
            inputs = np.frombuffer(command.inputs, np.int32) if command.inputs else self._idle[command.bucket]
            if command.after:
                inputs = self._continued(command, inputs)
            packed = jax.device_put(inputs, self.device)
            began = time.perf_counter()
            outputs = programs.step(command.bucket)(adopted.arguments(packed))
            if self.runs_beside:
                self.protect()
            poisoned = self._poisoned(outputs, inputs, command.bucket)
            if poisoned or (command.after and self._chosen is None):
                # The others may be in the step after this one already, and need this rank's part of its exchange.
                self._last, self._chosen = (command.epoch, command.step), None
                text = f"{len(poisoned)} rows came out as not-a-number or infinite"
                failed = link_pb2.StepFailed(epoch=command.epoch, step=command.step, error=text, poisoned_rows=poisoned)
                return link_pb2.Report(rank=self.rank, step_failed=failed)
            wrote = written(inputs, self.shape.buckets[command.bucket])
            self._index.wrote(wrote.entries // self.shape.page_size)
            answers = self._finish(outputs, packed, command, adopted.mesh)
            self._last = command.epoch, command.step
            self._chosen = np.frombuffer(answers["tokens"], np.int32) if answers else np.zeros(0, np.int32)
            self._uncopied = None if outputs is None else (command.step, command.bucket, wrote, outputs)
            load = b"" if outputs is None else np.asarray(outputs.expert_load.addressable_data(0)).tobytes()
            ended = time.perf_counter()
        except (jax.errors.JaxRuntimeError, ValueError, StaleEpoch) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0][:500]
            failed = link_pb2.StepFailed(epoch=command.epoch, step=command.step, error=text)
            return link_pb2.Report(rank=self.rank, step_failed=failed)
        done = link_pb2.StepDone(
            epoch=command.epoch,
            step=command.step,
            **answers,
            expert_load=load,
            program_ms=1e3 * (ended - began),
            total_ms=1e3 * (time.perf_counter() - received),
            compiles=self.compiles.count,
            own_ms=1e3 * (ended - self._sampled + began - received),
        )
        return link_pb2.Report(rank=self.rank, step_done=done)

    def _continued(self, command: link_pb2.Step, inputs: np.ndarray) -> np.ndarray:
        """The inputs of a step with the tokens that the step before it chose; as they are where that is void."""
        if self._last != (command.epoch, command.after):
            raise StaleEpoch(f"step {command.step} follows step {command.after}; the last one here was {self._last}")
        sources = np.frombuffer(command.sources, np.int32)
        rows = np.flatnonzero(sources >= 0)
        if self._chosen is None or not len(rows):
            return inputs
        inputs = inputs.copy()
        inputs[rows] = self._chosen[sources[rows]]  # tokens stand first in the packed inputs, decode rows first in them
        return inputs

    def _poisoned(self, outputs: StepOutputs | None, inputs: np.ndarray, bucket: int) -> list[int]:
        """Rows of the step that are no numbers, padding left out. A failed collective shows itself here."""
        if outputs is None:
            return []
        hidden = np.asarray(outputs.hidden.addressable_data(0))
        if np.isfinite(hidden.sum()):
            return []
        rows = self.shape.buckets[bucket].rows
        positions = inputs[rows : 2 * rows]  # they stand second in the packed inputs
        return np.flatnonzero(~np.isfinite(hidden).all(-1) & (positions >= 0)).tolist()

    def _finish(
        self, outputs: StepOutputs | None, packed: jax.Array, command: link_pb2.Step, mesh: MeshKey
    ) -> dict[str, Any]:
        """What follows a step on this rank alone: sample, score, and commit to the cache; nothing on an expert rank.
        Fields of the answer."""
        if outputs is None:
            self._sampled = time.perf_counter()
            return {}
        local, head = self._local[mesh.slots], self.arrays.head
        sample, commit = local.after_step(command.bucket)
        hidden = outputs.hidden.addressable_data(0)
        if command.shapes:
            bucket, size = self.shape.buckets[command.bucket], self.shape.cfg.vocab_size
            shaping = dense({row.segment: _row_shape(row) for row in command.shapes}, bucket.segments, size)
            shaping = jax.device_put(shaping, self.device)
            sampled = local.sample_shaped(command.bucket)(head, hidden, packed, shaping)
        else:
            sampled = sample(head, hidden, packed)
        scored = []
        for tile in command.targets:
            row, targets = jax.device_put((np.int32(tile.row), np.frombuffer(tile.targets, np.int32)), self.device)
            scored.append(local.score(command.bucket)(head, hidden, row, targets))
        # A step that failed says so here, before anything is committed.
        jax.block_until_ready((sampled, scored))
        self._sampled = time.perf_counter()
        new = jax.tree.map(lambda a: a.addressable_data(0), outputs.new_kv)
        written = packed if outputs.written is None else outputs.written.addressable_data(0)
        self.arrays.cache = commit(self.arrays.cache, new, written)
        return {
            "tokens": np.asarray(sampled[0]).tobytes(),
            "logprobs": np.asarray(sampled[1]).tobytes(),
            "likeliest": _likeliest(*sampled[2:]) if command.shapes else None,
            "scores": [
                link_pb2.TileScores(logprobs=np.asarray(logprobs).tobytes(), likeliest=_likeliest(*top))
                for logprobs, *top in scored
            ],
        }

    @property
    def shape(self) -> ModelShape:
        assert self._shape is not None, "Configure comes first"
        return self._shape

    @property
    def executables(self) -> ExecutableStore:
        assert self._executables is not None, "Configure comes first"
        return self._executables

    @property
    def arrays(self) -> LiveArrays:
        assert self._arrays is not None, "Configure comes first"
        return self._arrays

    @property
    def shelf(self) -> Shelf:
        assert self._shelf is not None, "Configure comes first"
        return self._shelf

    @property
    def device(self) -> jax.Device:
        return self.world.devices([self.rank])[0]


class StaleEpoch(RuntimeError):
    """A step of an epoch that this rank is not in."""


class Attachment:
    """One stream to a front, from hello to its end; what is said after that reaches nobody."""

    def __init__(self, channel: grpc.Channel, hello: link_pb2.Report) -> None:
        self.over = False
        self._reports: queue.Queue[link_pb2.Report | None] = queue.Queue()
        self._reports.put(hello)
        self.commands: Iterator[link_pb2.Command] = link_pb2_grpc.RankLinkStub(channel).Attach(
            iter(self._reports.get, None)
        )

    def say(self, report: link_pb2.Report) -> None:
        """Send a report."""
        if not self.over:
            self._reports.put(report)

    def end(self) -> None:
        """The stream has ended."""
        self.over = True
        self._reports.put(None)


class Link:
    """The streams to the front, and to the next one when it dies and this rank is to stay: receives on a thread of its
    own, obeys on the main one."""

    def __init__(self, rank: Rank, way: Way, token: str, *, stays: bool) -> None:
        self._rank = rank
        self._way = way
        self._token = token
        self._stays = stays
        self._orders: queue.Queue[tuple[Attachment, link_pb2.Command, float]] = queue.Queue()
        self._attachment: Attachment | None = None
        self._loader = concurrent.futures.ThreadPoolExecutor(1, "loader")

    def run(self) -> None:
        """Obey until the front says stop or, unless this rank stays, is gone."""
        threading.Thread(target=self._receive, daemon=True, name="receiver").start()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        free_at = 0.0
        while True:
            front, command, received = self._orders.get()
            what = command.WhichOneof("what")
            if not front.over:
                if what == "step":
                    report = self._rank.step(command.step, max(received, free_at))
                    self._tell(front)
                    front.say(report)
                elif what == "prepare":
                    self._loader.submit(self._obey, front, command, what)
                else:
                    self._protect(front)
                    self._obey(front, command, what)
            if self._orders.empty() or not self._rank.runs_beside:
                self._protect(front)
            free_at = time.perf_counter()

    def _protect(self, front: Attachment) -> None:
        self._rank.protect()
        self._tell(front)

    def _obey(self, front: Attachment, command: link_pb2.Command, what: str) -> None:
        began = time.perf_counter()
        try:
            result = getattr(self._rank, what)(getattr(command, what))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            print(f"rank {self._rank.rank}: {what} failed: {text}", file=sys.stderr, flush=True)
            front.say(link_pb2.Report(rank=self._rank.rank, failed=link_pb2.Failed(id=command.id, error=text[:2000])))
            return
        self._tell(front)
        done = link_pb2.Done(
            id=command.id,
            milliseconds=1e3 * (time.perf_counter() - began),
            compiles=self._rank.compiles.count,
            **result,
        )
        front.say(link_pb2.Report(rank=self._rank.rank, done=done))

    def _tell(self, front: Attachment) -> None:
        for report in self._rank.told():
            front.say(report)

    def _receive(self) -> None:
        while True:
            with self._way.channel() as channel:
                self._attachment = front = Attachment(channel, self._rank.hello(self._token))
                try:
                    for command in front.commands:
                        what = command.WhichOneof("what")
                        if what == "abort":
                            self._rank.abort(command.abort.epoch, command.abort.connecting)
                        elif what == "stop":
                            os._exit(0)
                        else:
                            self._orders.put((front, command, time.perf_counter()))
                    refused, why = False, "it closed the stream"
                except grpc.RpcError as error:
                    refused, why = error.code() == grpc.StatusCode.UNAUTHENTICATED, error.code().name
                front.end()
            if refused or not self._stays:
                # Nothing here is worth an orderly end: a rank may be killed at any time, and a collective may hang.
                print(f"rank {self._rank.rank}: the front is gone: {why}", file=sys.stderr, flush=True)
                os._exit(0)
            self._rank.forsaken()
            time.sleep(REDIAL_S)

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            if self._attachment is not None:
                self._attachment.say(link_pb2.Report(rank=self._rank.rank, heartbeat=link_pb2.Heartbeat()))


def _row_shape(row: link_pb2.RowShape) -> RowShape:
    return RowShape(
        tokens=np.frombuffer(row.tokens, np.int32),
        add=np.frombuffer(row.add, np.float32),
        seen=np.frombuffer(row.seen, np.int32),
        repetition=row.repetition,
        allowed=np.frombuffer(row.allowed, np.uint32),
    )


def _weights(of: link_pb2.Weights) -> Weights:
    return Weights(of.layer, tuple(of.experts), of.parity)


def _likeliest(tokens: jax.Array, logprobs: jax.Array) -> link_pb2.Likeliest:
    return link_pb2.Likeliest(tokens=np.asarray(tokens).tobytes(), logprobs=np.asarray(logprobs).tobytes())


def _expert_slots(found: Iterable[tuple[int, int, int]]) -> list[link_pb2.ExpertSlot]:
    return [link_pb2.ExpertSlot(layer=layer, slot=slot, expert=expert) for layer, slot, expert in found]


def main() -> None:
    """Attach to the front named in the environment and obey."""
    die_with_parent()
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or systemd tells the whole group; the front drains
    way = Way.given()
    Link(Rank(int(os.environ[RANK]), way), way, os.environ[TOKEN], stays=STAY in os.environ).run()


if __name__ == "__main__":
    main()
