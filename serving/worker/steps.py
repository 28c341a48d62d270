"""Steps on a rank: run the step program, check its rows, sample and score, and commit to the cache."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from moejax.config.step_inputs import Bucket, host_field
from moejax.model.decoder import StepOutputs
from moejax.model.logits import RowAdjustment, dense_adjustments
from moejax.runtime.distributed import is_exchange_failure
from moejax.runtime.kv_transfer import written_rows
from moejax.runtime.programs import LocalPrograms, MeshPrograms
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.worker.kv_cache import RankKVCache
from serving.worker.meshes import RankMeshes
from serving.worker.state import AdoptedPlan, CommittedStep, WorkerState
from serving.worker.step_errors import OWN_ERRORS, NonFiniteLogits, OwnFailure, StaleEpoch, alone

MAX_ERROR_CHARACTERS = 500


@dataclasses.dataclass(frozen=True)
class LastStep:
    """The last step of this rank: its epoch and number, and the tokens it chose by segment, None when they are void."""

    epoch: int
    step: int
    tokens: np.ndarray | None


class RankSteps:
    """Runs steps, one at a time, on the main thread."""

    def __init__(self, state: WorkerState, meshes: RankMeshes, kv_cache: RankKVCache) -> None:
        self._state = state
        self._meshes = meshes
        self._kv_cache = kv_cache
        self._last = LastStep(-1, -1, None)
        self._sampled_at = 0.0

    @property
    def run_beside_host(self) -> bool:
        """True when a step that was started goes on without the main thread, which can then do something else."""
        plan = self._state.plan
        return plan is not None and not plan.mesh.attention

    def step(self, command: link_pb2.Step, received_at: float) -> link_pb2.Report:
        """Run one step and commit it. The report is StepDone, or StepFailed with nothing committed."""
        state = self._state
        try:
            plan = self._plan_of(command)
            state.prefix_index.add(command.full)
            state.world.use(plan.mesh.ranks)
            inputs = self._inputs(command)
            packed = jax.device_put(inputs, state.device)
            started_at = time.perf_counter()
            arguments = plan.arguments(packed)
            outputs = self._run(plan, command, arguments)
            non_finite_rows = self._non_finite_rows(outputs, inputs, command.bucket)
            if non_finite_rows or (command.after and self._last.tokens is None):
                self._take_part_in_drafts(arguments, outputs, command, plan.mesh)
                return self._failed_by_rows(command, non_finite_rows)
            answers, committed = self._finish(outputs, arguments, inputs, packed, command, plan.mesh)
            self._note(command, answers, committed)
            load = b""
            if committed is not None:
                load = np.asarray(committed.outputs.expert_load.addressable_data(0)).tobytes()
            ended_at = time.perf_counter()
        except NonFiniteLogits as error:
            return self._failed_by_rows(command, error.rows)
        except OwnFailure as error:
            self._last = LastStep(command.epoch, command.step, None)
            return self._failed(command, error.cause)
        except (jax.errors.JaxRuntimeError, ValueError, StaleEpoch) as error:
            return self._failed(command, error)
        done = link_pb2.StepDone(
            epoch=command.epoch,
            step=command.step,
            **answers,
            expert_load=load,
            program_ms=1e3 * (ended_at - started_at),
            total_ms=1e3 * (time.perf_counter() - received_at),
            compiles=state.compiles.count,
            own_ms=1e3 * (ended_at - self._sampled_at + started_at - received_at),
        )
        return link_pb2.Report(rank=state.rank, step_done=done)

    def warm_up(self, key: MeshKey) -> None:
        """Run the small steps of a mesh once on nothing. The first run of a program takes several times as long as the
        next one, and should not be the step after a loss."""
        model, programs, arguments = self._state.model, self._meshes.programs(key), self._meshes.step_arguments(key)
        for index, bucket in enumerate(model.shape.buckets):
            if self._meshes.is_small(bucket):
                inputs = model.idle_inputs[index]
                packed = jax.device_put(inputs, self._state.device)
                own = arguments(packed)
                self._finish(programs.step(index)(own), own, inputs, packed, link_pb2.Step(bucket=index), key)

    def _plan_of(self, command: link_pb2.Step) -> AdoptedPlan:
        """The plan in force. Raises StaleEpoch unless the step is of its epoch."""
        plan = self._state.plan
        if plan is None or plan.epoch != command.epoch or command.epoch <= self._state.aborted_epoch:
            epoch = plan.epoch if plan else None
            raise StaleEpoch(f"step {command.step} is of epoch {command.epoch}; this rank is in {epoch}")
        return plan

    def _inputs(self, command: link_pb2.Step) -> np.ndarray:
        """The packed inputs. Of a step made before the results of the one before, with the tokens that it chose; as
        they are where those tokens are void."""
        idle_inputs = self._state.model.idle_inputs[command.bucket]
        inputs = np.frombuffer(command.inputs, np.int32) if command.inputs else idle_inputs
        if not command.after:
            return inputs
        last = self._last
        if (last.epoch, last.step) != (command.epoch, command.after):
            text = f"step {command.step} follows step {command.after}; the last one here was {(last.epoch, last.step)}"
            raise StaleEpoch(text)
        sources = np.frombuffer(command.sources, np.int32)
        rows = np.flatnonzero(sources >= 0)
        if last.tokens is None or not len(rows):
            return inputs
        inputs = inputs.copy()
        inputs[rows] = last.tokens[sources[rows]]  # tokens stand first in the packed inputs, decode rows first in them
        return inputs

    def _run(self, plan: AdoptedPlan, command: link_pb2.Step, arguments: Any) -> StepOutputs | None:
        """Start the step program, and replicate what the step before wrote while it runs."""
        outputs = self._meshes.programs(plan.mesh).step(command.bucket)(arguments)
        if self.run_beside_host:
            self._kv_cache.replicate()
        return outputs

    def _non_finite_rows(self, outputs: StepOutputs | None, inputs: np.ndarray, bucket: int) -> list[int]:
        """Rows of the step that are not-a-number or infinite, padding excluded. A failed collective raises here."""
        if outputs is None:
            return []
        hidden = np.asarray(outputs.hidden.addressable_data(0))
        if np.isfinite(hidden.sum()):
            return []
        rows = self._state.model.shape.buckets[bucket].rows
        positions = inputs[rows : 2 * rows]  # they stand second in the packed inputs
        return np.flatnonzero(~np.isfinite(hidden).all(-1) & (positions >= 0)).tolist()

    @staticmethod
    def _check_logits(logprobs: np.ndarray, inputs: np.ndarray, bucket: Bucket) -> None:
        """Raise NonFiniteLogits for segments whose hidden state is finite and whose logits, as the model has them, are
        not. Segments that sample nothing are excluded."""
        if np.isfinite(logprobs.sum()):
            return
        rows = host_field(inputs, bucket, "sample_row")[~np.isfinite(logprobs)]
        read = host_field(inputs, bucket, "read")[rows].astype(bool)
        filled = host_field(inputs, bucket, "positions")[rows] >= 0
        if bad := rows[read & filled].tolist():
            raise NonFiniteLogits(bad)

    def _failed_by_rows(self, command: link_pb2.Step, non_finite_rows: list[int]) -> link_pb2.Report:
        """End a step with bad rows, or one that takes tokens of such a step. The other ranks may be in the next step
        already and need this rank's part of its exchange, so that a step is run to its end all the same."""
        self._last = LastStep(command.epoch, command.step, None)
        text = f"{len(non_finite_rows)} rows came out as not-a-number or infinite"
        failed = link_pb2.StepFailed(
            epoch=command.epoch, step=command.step, error=text, non_finite_rows=non_finite_rows
        )
        return link_pb2.Report(rank=self._state.rank, step_failed=failed)

    def _failed(self, command: link_pb2.Step, error: Exception) -> link_pb2.Report:
        """The report of a step that ended with an error."""
        text = (str(error).splitlines() or [type(error).__name__])[0][:MAX_ERROR_CHARACTERS]
        exchange = is_exchange_failure(error)
        failed = link_pb2.StepFailed(epoch=command.epoch, step=command.step, error=text, exchange=exchange)
        return link_pb2.Report(rank=self._state.rank, step_failed=failed)

    def _note(self, command: link_pb2.Step, answers: dict[str, Any], committed: CommittedStep | None) -> None:
        tokens = np.frombuffer(answers["tokens"], np.int32) if answers else np.zeros(0, np.int32)
        self._last = LastStep(command.epoch, command.step, tokens)
        self._kv_cache.note_committed(committed)

    def _finish(
        self,
        outputs: StepOutputs | None,
        arguments: Any,
        inputs: np.ndarray,
        packed: jax.Array,
        command: link_pb2.Step,
        mesh: MeshKey,
    ) -> tuple[dict[str, Any], CommittedStep | None]:
        """Sample, score, and commit to the cache: all that follows a step on this rank alone, and nothing on an expert
        rank; with a layer of multi-token prediction the drafts too, which all ranks make together. `packed` is `inputs`
        on the device. Returns fields of StepDone, and what was committed. Raises NonFiniteLogits, and OwnFailure."""
        if outputs is None:
            self._sampled_at = time.perf_counter()
            return {}, None
        local = self._meshes.local(mesh.slots)
        hidden = outputs.hidden.addressable_data(0)
        sampled, drafts, outputs = self._sample_and_draft(local, arguments, outputs, packed, command, mesh)
        jax.block_until_ready(drafts)  # a failed exchange raises here
        with alone():
            scores = self._score(local, hidden, command)
            # A step that failed raises here, before anything is committed.
            jax.block_until_ready((sampled, scores))
            self._check_logits(np.asarray(sampled[1]), inputs, self._state.model.shape.buckets[command.bucket])
            self._sampled_at = time.perf_counter()
            committed = self._commit(local, outputs, inputs, packed, command)
        return {
            "tokens": np.asarray(sampled[0]).tobytes(),
            "logprobs": np.asarray(sampled[1]).tobytes(),
            "likeliest": _likeliest(*sampled[2:]) if command.adjustments else None,
            "scores": [
                link_pb2.TileScores(logprobs=np.asarray(logprobs).tobytes(), likeliest=_likeliest(*top))
                for logprobs, *top in scores
            ],
            "drafts": b"" if drafts is None else np.asarray(drafts).tobytes(),
        }, committed

    def _commit(
        self, local: LocalPrograms, outputs: StepOutputs, inputs: np.ndarray, packed: jax.Array, command: link_pb2.Step
    ) -> CommittedStep:
        """Write the new entries of a step to the cache."""
        model = self._state.model
        bucket = model.shape.buckets[command.bucket]
        wrote = written_rows(inputs, bucket)
        self._state.prefix_index.invalidate(wrote.entries // model.shape.page_size)
        if bucket.states:
            self._state.prefix_index.invalidate_snapshots(host_field(inputs, bucket, "state_write"))
        new = jax.tree.map(lambda a: a.addressable_data(0), outputs.new_kv)
        where = packed if outputs.group_inputs is None else outputs.group_inputs.addressable_data(0)
        _, commit = local.after_step(command.bucket)
        model.arrays.cache = commit(model.arrays.cache, new, where)
        return CommittedStep(command.step, command.bucket, wrote, outputs)

    def _sample_and_draft(
        self,
        local: LocalPrograms,
        arguments: Any,
        outputs: StepOutputs,
        packed: jax.Array,
        command: link_pb2.Step,
        mesh: MeshKey,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, StepOutputs]:
        """This rank's samples, and what `_draft` returns. A rank that cannot sample takes part in the drafts all the
        same, since the other ranks wait for it there. Raises OwnFailure."""
        try:
            sampled = self._sample(local, outputs.hidden.addressable_data(0), packed, command)
            if self._drafts(command):  # tokens that could not be sampled would keep this rank from drafting
                jax.block_until_ready(sampled)
        except OWN_ERRORS as error:
            self._take_part_in_drafts(arguments, outputs, command, mesh)
            raise OwnFailure(error) from error
        return sampled, *self._draft(arguments, outputs, sampled[0], command, mesh)

    def _draft(
        self, arguments: Any, outputs: StepOutputs, tokens: jax.Array, command: link_pb2.Step, mesh: MeshKey
    ) -> tuple[jax.Array | None, StepOutputs]:
        """This rank's drafts `[Z, n]` after the sampled tokens, and the step's outputs with those of the layer that
        drafts; None and the outputs as they are for a model without it, and in a step that skips it."""
        programs = self._meshes.programs(mesh)
        if not self._drafts(command) or not isinstance(programs, MeshPrograms):
            return None, outputs
        made = programs.draft(command.bucket)(arguments, outputs, tokens)
        outputs = dataclasses.replace(outputs, new_kv=made.new_kv, expert_load=made.expert_load)
        return made.drafts.addressable_data(0), outputs

    def _drafts(self, command: link_pb2.Step) -> bool:
        """Whether the model's layer that drafts runs after a step: on all ranks, or on none."""
        return self._state.model.shape.cfg.mtp and not command.skip_drafts

    def _take_part_in_drafts(
        self, arguments: Any, outputs: StepOutputs | None, command: link_pb2.Step, mesh: MeshKey
    ) -> None:
        """Draft after a step that failed on this rank alone: the other ranks draft, and need its part of the
        exchange."""
        if outputs is not None and self._drafts(command):
            tokens = np.zeros(self._state.model.shape.buckets[command.bucket].segments, np.int32)
            jax.block_until_ready(
                self._draft(arguments, outputs, jax.device_put(tokens, self._state.device), command, mesh)
            )

    def _sample(
        self, local: LocalPrograms, hidden: jax.Array, packed: jax.Array, command: link_pb2.Step
    ) -> tuple[jax.Array, ...]:
        """Tokens and log-probabilities by segment; where logits are processed, also the likeliest tokens of each
        segment and their log-probabilities."""
        head = self._state.model.arrays.head
        if not command.adjustments:
            sample, _ = local.after_step(command.bucket)
            return sample(head, hidden, packed)
        shape = self._state.model.shape
        rows = {row.segment: _row_adjustment(row) for row in command.adjustments}
        adjustments = dense_adjustments(rows, shape.buckets[command.bucket].segments, shape.cfg.vocab_size)
        return local.sample_adjusted(command.bucket)(
            head, hidden, packed, jax.device_put(adjustments, self._state.device)
        )

    def _score(self, local: LocalPrograms, hidden: jax.Array, command: link_pb2.Step) -> list[tuple[jax.Array, ...]]:
        """Log-probabilities of the wanted tokens of each tile, its likeliest tokens, and their log-probabilities."""
        scores = []
        for tile in command.targets:
            wanted = (np.int32(tile.row), np.frombuffer(tile.targets, np.int32))
            row, targets = jax.device_put(wanted, self._state.device)
            scores.append(local.score(command.bucket)(self._state.model.arrays.head, hidden, row, targets))
        return scores


def _row_adjustment(row: link_pb2.RowAdjustment) -> RowAdjustment:
    return RowAdjustment(
        tokens=np.frombuffer(row.tokens, np.int32),
        add=np.frombuffer(row.add, np.float32),
        seen=np.frombuffer(row.seen, np.int32),
        repetition=row.repetition,
        allowed=np.frombuffer(row.allowed, np.uint32),
    )


def _likeliest(tokens: jax.Array, logprobs: jax.Array) -> link_pb2.Likeliest:
    return link_pb2.Likeliest(tokens=np.asarray(tokens).tobytes(), logprobs=np.asarray(logprobs).tobytes())
