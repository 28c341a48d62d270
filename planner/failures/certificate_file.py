"""Certificates as files: the verdict on a plan, hashes of what it was made from, and a signature.

The signature is HMAC-SHA256 over the file's other content, with a key that whoever certifies shares with whoever
checks. It says that somebody with the key wrote this verdict about the plan, model and data with these hashes, and that
nothing in it was changed since. It does not say that the planner's figures are right.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from planner.cost.front import constants_of
from planner.errors import InputError
from planner.failures.certificate import ServiceLevels, Terms, Verdict
from planner.failures.loss_model import LossModel
from planner.failures.pool_losses import PoolLossModel
from planner.inputs.file_kinds import FileKind
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.pools import PooledDeployment

FORM = 1
"""Version of the file."""
CERTIFICATE = FileKind(no="no certificate", way_out="Give the file of `moejax plan certify --out FILE`.", form=FORM)
LEAST_KEY = 16
"""Fewest bytes of a key."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The content of a certificate file.

    `hashes` are SHA-256 by what they are of, `means` the means of recovery allowed, `one_front` whether the work of one
    front counts; `signature` is empty for one that is not signed.
    """

    terms: Terms
    traffic: Traffic
    means: tuple[str, ...]
    one_front: bool
    hashes: Mapping[str, str]
    verdict: Mapping[str, Any]
    signature: str = ""

    @property
    def holds(self) -> bool:
        """The verdict: every loss keeps the service levels."""
        return bool(self.verdict["holds"])

    def signed(self, key: bytes) -> Certificate:
        """The same certificate with its signature."""
        return replace(self, signature=_sign(self, key))

    def check(self, key: bytes) -> None:
        """Raise InputError unless somebody with the key has signed exactly this."""
        if not self.signature:
            raise InputError("the certificate is not signed; certify with --key FILE")
        if not hmac.compare_digest(self.signature, _sign(self, key)):
            raise InputError("the signature of the certificate is not of this key, or its content was changed")

    def differences(self, deployment: Deployment | PooledDeployment) -> list[str]:
        """The parts of a deployment that are not as they were certified, of plan, model, cluster and loads."""
        now = deployment_hashes(deployment)
        return [name for name, value in now.items() if self.hashes.get(name) != value]

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal certificate."""
        return json.dumps(_content(self) | {"signature": self.signature}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate written by `to_json`. InputError for any other text."""
        data = CERTIFICATE.parse_object(text, "form", "sha256", "slo", "verdict")
        try:
            if not isinstance(data["verdict"]["holds"], bool):
                raise TypeError(f"the verdict holds is {data['verdict']['holds']!r}, it must be true or false")
            return cls(
                terms=Terms(
                    survive=FaultTolerance(**data["survive"]),
                    levels=ServiceLevels(**data["slo"]),
                    requests=int(data["requests"]),
                ),
                traffic=Traffic(**data["traffic"]),
                means=tuple(map(str, data["means"])),
                one_front=bool(data["one_front"]),
                hashes={str(name): str(value) for name, value in data["sha256"].items()},
                verdict=data["verdict"],
                signature=str(data["signature"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CERTIFICATE.wrong(error) from None


def certificate(losses: LossModel | PoolLossModel, terms: Terms, verdict: Verdict, *, one_front: bool) -> Certificate:
    """The certificate, not signed, of a verdict on the deployment of `losses`."""
    deployment, recovery = losses.deployment, losses.recovery
    return Certificate(
        terms=terms,
        traffic=_pools(deployment)[-1].traffic,
        means=tuple(sorted(losses.means)),
        one_front=one_front,
        hashes=deployment_hashes(deployment)
        | {"recovery": _hash(asdict(recovery.times)), "front": _hash(constants_of(recovery.front))},
        verdict=verdict.to_dict(),
    )


def deployment_hashes(deployment: Deployment | PooledDeployment) -> dict[str, str]:
    """SHA-256 of a deployment's plan (without its epoch and its predictions), model, cluster and expert loads; of all
    pools where there are several."""
    pools = _pools(deployment)
    found = {
        "plan": [json.loads(replace(d.plan, epoch=0, cost=()).to_json()) for d in pools],
        "model": [asdict(d.workload) for d in pools],
        "cluster": [asdict(d.cluster) for d in pools],
        "loads": [d.loads for d in pools],
    }
    return {
        name: _hash(each if name != "model" and isinstance(deployment, PooledDeployment) else each[-1])
        for name, each in found.items()
    }


def _pools(deployment: Deployment | PooledDeployment) -> tuple[Deployment, ...]:
    """The deployments of one mesh each; that for decode is the last one."""
    return tuple(deployment.pools().values()) if isinstance(deployment, PooledDeployment) else (deployment,)


def read_certificate(path: str | Path) -> Certificate:
    """The certificate in a file. InputError when it cannot be read or is none."""
    return CERTIFICATE.read(path, Certificate.from_json)


def read_key(path: str | Path) -> bytes:
    """The key in a file: all its bytes but blanks at its end. InputError when there are fewer than LEAST_KEY."""
    try:
        key = Path(path).read_bytes().rstrip()
    except OSError as error:
        raise InputError(f"cannot read key {path}: {error.strerror}") from None
    if len(key) < LEAST_KEY:
        raise InputError(
            f"key {path} has {len(key)} bytes, at least {LEAST_KEY} are needed: openssl rand -hex 32 > {path}"
        )
    return key


def _content(signed: Certificate) -> dict[str, Any]:
    """Everything that the signature is of."""
    return {
        "form": FORM,
        "survive": asdict(signed.terms.survive),
        "slo": asdict(signed.terms.levels),
        "requests": signed.terms.requests,
        "traffic": asdict(signed.traffic),
        "means": list(signed.means),
        "one_front": signed.one_front,
        "sha256": dict(signed.hashes),
        "verdict": signed.verdict,
    }


def _sign(certified: Certificate, key: bytes) -> str:
    return hmac.new(key, _canonical(_content(certified)), hashlib.sha256).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    """JSON with one form for each value: keys in order, no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
