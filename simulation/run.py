"""Runs one scenario from its beginning to its end, and says which laws were broken."""

import asyncio
import dataclasses
import functools
import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.core.loop import Loop
from serving.protocol.instructions import Instruction
from simulation.clients import SimulatedClient
from simulation.front import Front
from simulation.injection import Injection
from simulation.launch import Processes
from simulation.scenario import Client, Scenario
from simulation.substitutions import substituted
from simulation.virtual_time import Deadlock, OutOfTime, VirtualTimeLoop
from simulation.world import World

MAX_TURNS = 600_000
"""Most turns of the event loop in a run; one that takes more goes round in circles."""
LIVENESS_S = 120.0
"""Virtual seconds after the last fault within which all calls end, and all ranks serve."""
LOOK_S = 0.25
"""Virtual seconds between two looks whether the server has recovered."""
CALL_UP_S = 5.0
"""Virtual seconds between two times that the operator asks for all ranks."""
RESTART_S = (0.02, 1.5)
"""Virtual seconds until the supervisor has started the next front."""
CANARY = Client(id="canary", at=0.0, prompt=(1, 2, 3), max_tokens=8, seed=5)
MEMORY = Path("/dev/shm")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run. `happened` counts the faults that took effect, by kind."""

    scenario: Scenario
    violations: tuple[str, ...]
    trace: tuple[str, ...]
    happened: Mapping[str, int]
    virtual_s: float
    turns: int
    tokens: int
    """Tokens that clients received."""


def run(scenario: Scenario) -> Outcome:
    """Run a scenario."""
    at = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="moejax-simulation-", dir=at) as folder:
        return _run(scenario, Path(folder))


def _run(scenario: Scenario, folder: Path) -> Outcome:
    world: World | None = None
    clients: list[SimulatedClient] = []
    delays: list[Any] = []
    loop = VirtualTimeLoop(max_turns=MAX_TURNS, thread_delay=lambda: delays[0].uniform(0.0, 0.01))

    async def main() -> None:
        nonlocal world
        world = World(scenario, folder)
        delays.append(world.random("threads"))
        clients.extend(SimulatedClient(world, plan) for plan in scenario.clients)
        with substituted(world):
            await _play(world, clients)

    unhandled: list[str] = []
    loop.set_exception_handler(lambda _, context: _note_unhandled(context, unhandled))
    collecting = gc.isenabled()
    _freeze_what_is_loaded()
    gc.disable()  # so that nothing depends on when it collects
    try:
        loop.run_until_complete(main())
    except Deadlock as error:
        assert world is not None
        world.violated(f"deadlock: {error}")
    except OutOfTime as error:
        assert world is not None
        world.violated(f"the run does not come to an end: {error}")
    finally:
        _abandon(loop)
        if collecting:
            gc.enable()
    assert world is not None
    for text in unhandled:
        world.violated(text)
    return Outcome(
        scenario=scenario,
        violations=tuple(world.violations),
        trace=tuple(world.trace),
        happened=dict(world.happened),
        virtual_s=loop.time(),
        turns=loop.turns,
        tokens=sum(len(tokens) for client in clients for tokens in client.tokens),
    )


@functools.cache
def _freeze_what_is_loaded() -> None:
    """Collect no garbage among what stays until the process ends, the modules above all."""
    gc.collect()
    gc.freeze()


def _note_unhandled(context: Mapping[str, Any], unhandled: list[str]) -> None:
    error = context.get("exception")
    if error is not None and "never retrieved" not in context["message"]:
        unhandled.append(f"{context['message']}: {type(error).__name__}: {error}")


def _abandon(loop: VirtualTimeLoop) -> None:
    """Close the loop; what still runs in it is dropped."""
    loop.set_exception_handler(lambda _, __: None)
    loop.close()


async def _supervise(world: World, processes: Processes) -> None:
    """Start a front after the other, each when the last one has ended."""
    draw, number = world.random("supervisor"), 0
    while not world.closing:
        number += 1
        front = Front(world, processes, number)
        world.front = front
        front.begin()
        await front.ended.wait()
        await asyncio.sleep(draw.uniform(*RESTART_S))


async def _play(world: World, clients: list[SimulatedClient]) -> None:
    supervisor = asyncio.create_task(_supervise(world, Processes()))
    injection = Injection(world)
    injecting = asyncio.create_task(injection.run())
    calls = [asyncio.create_task(client.run()) for client in clients]
    await asyncio.sleep(world.scenario.seconds)
    await injecting
    if world.scenario.mode == "liveness":
        await _check_liveness(world, injection, clients, calls)
    world.closing = True
    world.note("the run ends: the front drains")
    front = world.front
    if isinstance(front, Front):
        await front.stop()
    supervisor.cancel()
    await asyncio.sleep(1.0)
    for client in clients:
        if client.waiting and not client.left:
            client.violated(f"it still waits for the end of its call (outcome {client.outcome!r})")
    for task in (*calls, *injection.operators):
        task.cancel()
    await asyncio.gather(supervisor, *calls, *injection.operators, return_exceptions=True)
    for client, call in zip(clients, calls, strict=True):
        if not call.cancelled() and (error := call.exception()) is not None:
            client.violated(f"the client failed: {type(error).__name__}: {error}")
    for rank in world.processes:
        rank.die("the run has ended")
    for agent in world.agents.values():
        await agent.end()


async def _check_liveness(
    world: World, injection: Injection, clients: list[SimulatedClient], calls: list["asyncio.Task[None]"]
) -> None:
    """Faults stop. Within a bound all calls end, a new one is served, all ranks serve, and operators have answers."""
    injection.heal()
    world.note("faults stop")
    until = world.loop.time() + LIVENESS_S
    while not (injection.instruct(Instruction(action="retry")) and injection.call_up()):
        await asyncio.sleep(LOOK_S)
        if world.loop.time() > until:
            world.violated(f"no front serves {LIVENESS_S:.0f} s after the last fault")
            return
    canary = asyncio.create_task(_call_until_served(world))
    called_up = world.loop.time()
    while world.loop.time() < until:
        why = _why_not_whole(world)
        if all(task.done() for task in (*calls, canary, *injection.operators)) and not why:
            world.note(f"the server is whole, {world.loop.time() + LIVENESS_S - until:.3f} s after the last fault")
            break
        if why and world.loop.time() > called_up + CALL_UP_S:  # a scale-down may have been under way
            called_up = world.loop.time()
            injection.call_up()
        await asyncio.sleep(LOOK_S)
    else:
        late = [client.plan.id for client, task in zip(clients, calls, strict=True) if not task.done()]
        for law in (
            f"calls {late} have not ended" if late else "",
            "a new call is not served" if not canary.done() else "",
            f"the server is not whole ({why})" if (why := _why_not_whole(world)) else "",
            "an operator has no answer" if any(not task.done() for task in injection.operators) else "",
        ):
            if law:
                world.violated(f"{law} {LIVENESS_S:.0f} s after the last fault")
    canary.cancel()
    await asyncio.gather(canary, return_exceptions=True)


async def _call_until_served(world: World) -> None:
    """One call after the other, until one is complete."""
    number, outcome = 0, ""
    while outcome != "complete":
        number += 1
        client = SimulatedClient(world, dataclasses.replace(CANARY, id=f"canary{number}"))
        await client.run()
        outcome = client.outcome
        await asyncio.sleep(LOOK_S)


def _why_not_whole(world: World) -> str:
    """Why the server does not serve on all its ranks with all experts; "" if it does."""
    front = world.front
    if not isinstance(front, Front) or not front.loops or front.dead:
        return "no front serves"
    return next((why for loop in front.loops if (why := _why_not_all(world, loop))), "")


def _why_not_all(world: World, loop: Loop) -> str:
    """Why a loop does not serve on all its ranks with all experts; "" if it does."""
    failover, plan = loop.failover, loop.failover.plan
    if plan is None:
        return f"no plan is in force: {failover.membership.no_plan_reason}"
    missing = sorted(set(failover.plans.base.rank_ids) - set(failover.plan_ranks))
    if missing:
        states = {rank: failover.membership.state(rank).name for rank in missing}
        return f"ranks {missing} do not serve: {states}"
    if plan.masked or failover.adoption.reconciling:
        return f"experts {plan.masked} are masked"
    damaged = [rank for rank in failover.plan_ranks if (process := world.ranks.get(rank)) and process.hand.is_damaged]
    if damaged and world.settings.scrub_s:
        return f"weights of ranks {damaged} are damaged"
    if failover.membership.next_weights != failover.membership.weights:
        return "other weights are decided on, and not in force"
    if failover.membership.comm_broken or loop.engine.maintenance.pending:
        return "something is still due"
    return ""
