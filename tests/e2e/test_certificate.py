"""A signed certificate of a plan, on real processes: the server says whether it holds, and what repair restores it."""

from pathlib import Path

from click.testing import CliRunner

from planner.cli.main import main as plan
from planner.plan.pools import PooledDeployment, read_any_deployment
from serving.api.client import Client
from serving.cli.main import main as cli
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import Traffic, wait_until

SETTINGS = {"survive": 1, "slots_per_rank": 4, "restart": False, "buckets": FEW_BUCKETS}
"""Sixteen slots for eight experts: one rank may be lost, and another after it, but not a third."""


def certified(plan_file: Path, folder: Path, without: str = "regrow") -> dict[str, str]:
    """The settings of a server with a certificate of the plan, made by the planner, and its key."""
    key, file = folder / "key", folder / "certificate.json"
    key.write_text("0123456789abcdef")
    terms = ["--survive", "ranks=1", "--slo", "capacity=0.2", "--load", "0.1", "--without", without]
    assert plan(["certify", str(plan_file), *terms, "--key", str(key), "--out", str(file)]) == 0
    assert plan(["certify", str(plan_file), "--check", str(file), "--key", str(key)]) == 0
    return {"certificate": str(file), "certificate_key": str(key)}


def test_a_loss_within_the_certificate_keeps_it_one_beyond_breaks_it_and_the_repair_restores_it(tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    with Server(model=str(TINY), ranks=4, chaos=True, **SETTINGS) as server, Client(server) as client:
        plan_file.write_text(client.plan())
        assert client.status().certificate == ""
    signed = certified(plan_file, tmp_path)
    with Server(model=str(TINY), ranks=4, chaos=True, **SETTINGS, **signed) as server, Client(server) as client:
        known = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=60)

        def certificate() -> str:
            return client.status().certificate

        wait_until(lambda: certificate() == "holds", "the certificate holds")
        known.during(client, lambda: client.kill(1))
        wait_until(lambda: serving(client) == [0, 2, 3] and certificate() == "holds", "it holds with three ranks")
        known.during(client, lambda: client.kill(3))
        wait_until(lambda: certificate() == "does not hold", "the second loss is beyond what it covers")
        broken = client.status()
        assert "8 experts do not fit in 4 slots" in broken.certificate_reason
        repair = broken.certificate_repair
        assert repair in ("rank 1 back", "rank 3 back")
        shown = CliRunner().invoke(cli, ["status", "--server", server.address], env={"COLUMNS": "200"}).output
        assert "does not hold" in shown
        assert repair in shown
        client.apply("scale_up", int(repair.split()[1]))
        wait_until(lambda: certificate() == "holds", "the repair restores it")
        assert (client.status().certificate_reason, client.status().certificate_repair) == ("", "")
        known.during(client)
        assert client.status().failed == 0
        assert client.status().compiles_after_ready == 0


def test_a_server_of_pools_says_whether_the_next_loss_of_either_side_keeps_the_levels(tmp_path: Path) -> None:
    pools = {
        "model": str(TINY),
        "arch": "pd",
        "prefill": 2,
        "decode": 2,
        "chaos": True,
        **SETTINGS,
        "slots_per_rank": 8,
    }
    plan_file = tmp_path / "plan.json"
    with Server(**pools) as server, Client(server) as client:
        plan_file.write_text(client.plan())
    assert isinstance(read_any_deployment(plan_file), PooledDeployment)
    signed = certified(plan_file, tmp_path, without="regrow,switch")
    with Server(**pools, **signed) as server, Client(server) as client:

        def certificate() -> str:
            return client.status().certificate

        wait_until(lambda: certificate() == "holds", "the certificate holds")
        client.kill(3)
        wait_until(lambda: certificate() == "does not hold", "the decode pool has one rank, and roles do not switch")
        assert client.status().certificate_repair == "rank 3 back"
        client.apply("scale_up", 3)
        wait_until(lambda: certificate() == "holds", "the repair restores it")


def serving(client: Client) -> list[int]:
    """The ranks that serve."""
    return [rank.id for rank in client.status().ranks if rank.state == "serving"]
