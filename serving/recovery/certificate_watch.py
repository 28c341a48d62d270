"""Whether the certificate of a server still holds: its terms, checked again on the plan in force after every change.

`moejax plan certify` makes the certificate (docs/planner.md). What it certifies is a plan; after a loss another plan is
in force, which may keep the same service levels through the next loss or not.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Collection, Hashable

from planner.errors import InputError, PlannerError
from planner.failures.certificate import certify
from planner.failures.certificate_file import Certificate, read_certificate, read_key
from planner.failures.loss_model import SERVED_MEANS, LossModel
from planner.failures.pool_losses import PoolLossModel
from planner.plan.pools import AnyDeployment, PooledDeployment
from serving.config import RecoverySettings
from serving.errors import InvalidRequest, NoCapacity

HOLDS, BROKEN, CHECKING = "holds", "does not hold", "checking"
EACH = 16
"""Losses of one size up to which each is priced: the bound takes less time, and the check shares the front's core."""
MOST_PRICED = 256
MOST_REPAIRS = 8
"""Lost ranks whose return alone is tried as a repair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificateState:
    """Whether a certificate holds, why not, and which ranks have to come back so that it does."""

    state: str
    reason: str = ""
    repair: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InForce:
    """The plan in force, the ranks it has lost, and `with_back`: the plan in force when some of them are back. That
    raises NoCapacity where there is none."""

    deployment: AnyDeployment
    lost: tuple[int, ...]
    with_back: Callable[[Collection[int]], AnyDeployment]


def check(certificate: Certificate, now: InForce) -> CertificateState:
    """The state of a certificate on the plan in force."""
    if "model" in certificate.differences(now.deployment):
        return CertificateState(state=BROKEN, reason="it is of another model")
    reason = _missed(certificate, now.deployment)
    if not reason:
        return CertificateState(state=HOLDS)
    return CertificateState(state=BROKEN, reason=reason, repair=_repair(certificate, now))


def _repair(certificate: Certificate, now: InForce) -> str:
    """The fewest lost ranks, one or all, with which it holds again; empty where it would not hold with all."""
    alone = [(rank,) for rank in now.lost[:MOST_REPAIRS]] if len(now.lost) > 1 else []
    for back in (*alone, now.lost):
        try:
            then = now.with_back(back)
        except NoCapacity:
            continue
        if back and not _missed(certificate, then):
            return f"rank{'s' if len(back) > 1 else ''} {', '.join(map(str, back))} back"
    return ""


def _missed(certificate: Certificate, deployment: AnyDeployment) -> str:
    """The first loss that misses the service levels of a certificate, and how; empty when none does."""
    means = [means for means in certificate.means if means in SERVED_MEANS]
    front, traffic = certificate.one_front, certificate.traffic
    try:
        if isinstance(deployment, PooledDeployment):
            pooled = deployment.each(lambda pool: dataclasses.replace(pool, traffic=traffic))
            losses = PoolLossModel(pooled, None, means, one_front=front)
        else:
            losses = LossModel(dataclasses.replace(deployment, traffic=traffic), None, means, one_front=front)
        verdict = certify(losses, certificate.terms, each=EACH, most_priced=MOST_PRICED)
    except PlannerError as error:
        return str(error)
    if verdict.holds:
        return ""
    failing = verdict.failing
    if verdict.missed or failing is None or failing.failing is None:
        return verdict.missed or "there are more losses than can be checked while serving"
    return f"after the loss of {failing.kind} {failing.failing.name}: {failing.missed}"


def read_signed(settings: RecoverySettings) -> Certificate | None:
    """The certificate that the settings name, None without one. Raises InvalidRequest when it cannot be read, or is not
    signed with the key."""
    if settings.certificate is None:
        return None
    try:
        certificate = read_certificate(settings.certificate)
        if settings.certificate_key is not None:
            certificate.check(read_key(settings.certificate_key))
    except InputError as error:
        raise InvalidRequest(str(error), param="certificate") from None
    return certificate


class CertificateWatch:
    """The certificate of one server, checked in a thread beside the steps whenever the status is asked for and the plan
    has changed since. One that cannot be read does not hold: a front that takes over must not fail for it."""

    def __init__(self, settings: RecoverySettings) -> None:
        self._key: Hashable = None
        self._task: asyncio.Task[None] | None = None
        try:
            self._certificate = read_signed(settings)
            self._state = CertificateState(state="" if self._certificate is None else CHECKING)
        except InvalidRequest as error:
            self._certificate = None
            self._state = CertificateState(state=BROKEN, reason=str(error))

    def state(self, key: Hashable, in_force: Callable[[], InForce | None]) -> CertificateState:
        """The state that was found last. Begins another check where `key`, which stands for the plan in force and all
        that was measured, is another than the last one's; `in_force` is asked for only then."""
        idle = self._task is None or self._task.done()
        if self._certificate is not None and idle and key != self._key:
            self._key, now = key, in_force()
            if now is None:
                self._state = CertificateState(state=BROKEN, reason="no rank is alive", repair="any rank back")
            else:
                work = asyncio.to_thread(check, self._certificate, now)
                self._task = asyncio.get_running_loop().create_task(self._take(work))
        return self._state

    async def _take(self, work: Awaitable[CertificateState]) -> None:
        self._state = await work
