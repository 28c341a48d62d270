"""The command line, each command in its own right and against a real server."""

import dataclasses
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import planner.cli.main
import serving.foreground
from planner.plan.deployment import read_deployment
from serving.auth.api_keys import ApiKeyFile
from serving.auth.limits import CallLimits
from serving.cli import main, serve
from serving.cli.printable import printable
from serving.cli.tables import event_line
from serving.config import Settings
from serving.protocol.events import Event
from serving.protocol.sampling import SamplingDefaults
from serving.protocol.status import LossForecast
from tests.support.fake_server import serve_in_thread


def run(*arguments: str, **options):
    return CliRunner().invoke(main.main, [str(a) for a in arguments], **options)


@pytest.mark.parametrize("name", ["", *main.main.commands])
def test_every_help_shows_an_example(name):
    result = run(*filter(None, [name]), "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.output
    assert f"moejax {name}" in result.output.partition("Example:")[2]


@pytest.mark.parametrize("name", [n for n in main.main.commands if n not in ("plan", "train", "bench")])
def test_every_option_says_what_it_does(name):
    options = [p for p in main.main.commands[name].params if isinstance(p, click.Option)]
    assert all(option.help for option in options)


def test_generate_streams_the_text(server):
    result = run("generate", "a", "--max-tokens", 3, "--server", server.address)
    assert (result.exit_code, result.stdout) == (0, "bcd\n")
    assert "`moejax chat`" in result.stderr  # the model has a chat template
    assert result.stderr.count("\n") == 1


def test_generate_reads_standard_input_and_the_environment(server):
    environment = {"MOEJAX_SERVER": server.address}
    result = run("generate", "-", "--max-tokens", 2, input="xa", env=environment)
    assert result.stdout == "bc\n"


def test_generate_as_json(server):
    result = run("generate", "a", "--max-tokens", 2, "--json", "--server", server.address)
    assert json.loads(result.output)["token_ids"] == [98, 99]


def test_generate_refuses_what_the_server_refuses_in_one_line(server):
    result = run("generate", "a", "--top-p", 7, "--server", server.address)
    assert result.exit_code == 1
    assert result.stderr == "moejax: top_p is 7.0; it must be between 0.0 and 1.0.\n"


def test_chat_keeps_the_conversation(server, backend):
    backend.reply = list(b"yes")
    result = run("chat", "--system", "s", "--server", server.address, input="hi\nmore\n/reset\nnew\n")
    assert result.stdout == "yes\nyes\nyes\n"
    prompts = [bytes(t for t in r.prompt if t < 256) for r in backend.requests]
    assert prompts == [b"shi", b"shiyesmore", b"snew"]


def test_status_shows_ranks_and_prepared_losses(server):
    result = run("status", "--server", server.address)
    assert result.exit_code == 0
    for text in ("ready", "1 rank: 100%", "1003", "serving"):
        assert text in result.output


@pytest.mark.parametrize("columns", [80, None])
def test_forecasts_are_legible_at_80_columns_and_whole_in_a_pipe(server, backend, monkeypatch, columns):
    reason = "256 experts do not fit in 12 slots " * 6
    monkeypatch.setattr(backend, "what_if", lambda: tuple(unsurvivable(rank, reason.strip()) for rank in range(3)))
    result = run("what-if", "--server", server.address, env={"COLUMNS": columns and str(columns)})
    assert result.exit_code == 0
    lines = result.output.split("\n")
    assert sum("impossible" in line and "12345678" in line for line in lines) == 3
    assert " ".join(result.output.split()).count(reason.strip()) == 3
    assert max(map(len, lines)) <= 80 if columns else sum(reason.strip() in line for line in lines) == 3


def test_forecasts_are_shown_as_ranges_with_their_source(server):
    lines = run("what-if", "--server", server.address, env={"COLUMNS": "80"}).output.split("\n")
    row = next(line for line in lines if "rank 0" in line)
    assert row.split()[-3:] == ["40.2-161", "100-400", "50-88%"]
    assert "ranges: estimated phases 2" in lines
    found = json.loads(run("what-if", "--server", server.address, "--json").output)
    assert (found[0]["stall_low_ms"], found[0]["stall_ms"], found[0]["stall_high_ms"]) == (40.25, 80.5, 161.0)


def unsurvivable(rank: int, reason: str) -> LossForecast:
    """The forecast of a loss that is not survivable, with long figures."""
    return LossForecast(
        kind="rank",
        name=str(rank),
        ranks=(rank,),
        survivable=False,
        reason=reason,
        prepared=False,
        requests_moved=1234,
        tokens_recomputed=12345678,
        experts_loaded=12345,
        stall_ms=123456.0,
        moved_stall_ms=1234567.0,
        capacity=1.0,
        traffic_lost=0.0,
    )


def test_status_has_the_sampling_defaults_of_the_model(server):
    assert "temperature 1 unless a request says otherwise" in run("status", "--server", server.address).output
    server.processor.sampling_defaults = SamplingDefaults(temperature=0.2, top_p=0.9, max_tokens=64)
    shown = " ".join(run("status", "--server", server.address).output.split())  # lines are wrapped
    assert "temperature 0.2, top_p 0.9, max_tokens 64 unless a request says otherwise" in shown
    as_json = json.loads(run("status", "--json", "--server", server.address).output)
    assert as_json["model"]["sampling_defaults"] == dataclasses.asdict(server.processor.sampling_defaults)


def test_status_has_the_channel_and_memory_of_kv_replicas(server):
    result = run("status", "--server", server.address)
    assert "memory, 1 MiB; 0 tokens of lost ranks restored" in result.output


def test_status_has_the_sources_of_lost_experts(server, backend):
    backend.epoch = 2
    shown = run("status", "--server", server.address).output
    assert "8 read from the host store, 6 rebuilt from parity" in shown
    assert "7 of 8 groups, 5 MiB" in shown


def test_status_has_the_padding_of_the_steps(server, backend):
    assert "0; no rows yet" in run("status", "--server", server.address).output
    run("generate", "hi", "--server", server.address)
    assert (
        f"{backend.status().steps}; 75% of their rows were padding" in run("status", "--server", server.address).output
    )


def test_status_plan_is_a_plan_file_that_the_planner_reads(server, backend, tmp_path):
    backend.dead.add(2)
    plan = tmp_path / "plan.json"
    plan.write_text(run("status", "--plan", "--server", server.address).output)
    assert read_deployment(plan) == backend.deployment()
    shown = run("plan", "degrade", str(plan), "--kinds", "rank")
    assert "1-rank losses: 3/3 survivable" in shown.output
    backend.dead.update(range(4))
    refused = run("status", "--plan", "--server", server.address)
    assert refused.exit_code == 1
    assert "no rank is alive" in refused.output


def test_status_as_json_is_the_whole_status(server, backend):
    status = json.loads(run("status", "--json", "--server", server.address).output)
    assert status["ranks"][3]["pid"] == 1003
    assert status["model"]["name"] == "fake"


def test_kill_and_events(server, backend):
    result = run("kill", 2, "--signal", "SIGSTOP", "--server", server.address)
    assert (result.exit_code, backend.killed) == (0, [(2, "SIGSTOP")])
    lines = run("events", "--server", server.address).output.splitlines()
    assert len(lines) == 2
    assert "rank_lost" in lines[0]
    assert "adopt 38.0 ms" in lines[1]
    events = run("events", "--json", "--after", 1, "--server", server.address).output.splitlines()
    assert [json.loads(e)["kind"] for e in events] == ["recovered"]


def test_kill_without_chaos_is_one_line(server, backend):
    backend.chaos = False
    result = run("kill", 1, "--server", server.address)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "--chaos" in result.stderr


@pytest.mark.parametrize("command", [("status",), ("events",), ("kill", "0"), ("generate", "x"), ("chat",)])
def test_no_server_is_one_line(command):
    result = run(*command, "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("moejax: no moejax server answers at 127.0.0.1:1")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def served(monkeypatch) -> list[Settings]:
    settings: list[Settings] = []
    for place in ((serve, "supervise"), (serving.foreground, "serve")):
        monkeypatch.setattr(*place, lambda s: settings.append(s) or 0)
    return settings


def test_serve_takes_flags_over_environment_over_file(served, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('model = "tiny"\nranks = 2\nmax_queue = 5\n')
    environment = {"MOEJAX_RANKS": "3", "MOEJAX_MAX_QUEUE": "6"}
    result = run("serve", "--config", file, "--ranks", 8, "--chaos", "--no-restart", env=environment)
    assert result.exit_code == 0
    settings = served[0]
    assert (settings.model, settings.ranks, settings.max_queue) == ("tiny", 8, 6)
    assert settings.chaos
    assert not settings.restart


def test_serve_without_flags_has_the_defaults(served):
    run("serve")
    assert served == [Settings()]


@pytest.mark.parametrize(
    ("text", "message"), [("rankz = 3", "Did you mean 'ranks'?"), ("ranks = 'x'", "'ranks' is 'x'")]
)
def test_serve_refuses_a_wrong_setting_in_one_line(served, tmp_path, text, message):
    file = tmp_path / "my.toml"
    file.write_text(text)
    result = run("serve", "--config", file)
    assert result.exit_code == 1
    assert message in result.stderr
    assert served == []


def test_plan_is_passed_on_as_it_is(monkeypatch):
    calls = []
    monkeypatch.setattr(planner.cli.main, "main", lambda arguments: calls.append(arguments) or 2)
    assert run("plan", "solve", "tiny", "--help").exit_code == 2
    assert calls == [["solve", "tiny", "--help"]]


def test_train_is_a_process_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 3)
    assert run("train", "--steps", "5").exit_code == 3
    assert calls[0][1:] == ["-m", "moejax.tools.train", "--steps", "5"]


def test_models_are_listed():
    ended = subprocess.run(
        [sys.executable, "-m", "serving", "models"], capture_output=True, text=True, timeout=120, check=True
    )
    known, listed = ended.stdout.split("\n\n")
    assert {line.split()[0] for line in known.splitlines()} == {"bench-mixtral", "smollm2-moe", "tiny"}
    assert "mixtral" in listed


@pytest.mark.parametrize("module", [("serving", "models"), ("moejax.tools.inspect", "--families")])
def test_a_reader_that_leaves_early_is_no_error_with_a_traceback(module):
    command = f"{sys.executable} -m {' '.join(module)} | true"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


def test_a_models_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\n\té\x9b数🎉\u200d") == "a\ufffd[2Jb\ufffd\n\té\ufffd数🎉\u200d"


def test_an_event_is_one_line():
    event = Event(sequence=1, time=0.0, kind="no_capacity", epoch=3, rank=2, cause="c", message="m")
    assert event_line(event).plain.split("  ", 1)[1] == "no_capacity       epoch 3  rank 2  c  m"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell):
    result = run("completion", shell)
    assert result.exit_code == 0
    assert f"_MOEJAX_COMPLETE={shell}_complete" in result.output


def test_the_settings_shown_are_those_in_force(tmp_path):
    file = tmp_path / "shown.toml"
    file.write_text(run("serve", "--ranks", 3, "--chaos", "--show-settings").output)
    assert Settings.load(file, {}) == Settings(ranks=3, chaos=True)


def test_bench_names_the_benchmarks_it_knows():
    result = run("bench", "recovry")
    assert result.exit_code == 1
    assert "recovery" in result.stderr


def test_commands_reach_a_server_that_wants_a_key(tmp_path, backend):
    keys = ApiKeyFile(tmp_path / "keys.json")
    secret = keys.add("a")
    with serve_in_thread(backend, limits=CallLimits.of(Settings(api_keys=str(keys.path)))) as guarded:
        refused = run("status", "--server", guarded.address)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        result = run("generate", "a", "--max-tokens", 2, "--server", guarded.address, env={"MOEJAX_API_KEY": secret})
        assert result.stdout == "bc\n"


def test_tokens_are_made_listed_and_removed(tmp_path):
    file = tmp_path / "tokens.json"
    made = run("tokens", "add", "hosts", "--file", file, "--days", 30)
    assert made.output.startswith("mjr_")
    listed = run("tokens", "list", "--file", file).output
    assert "hosts" in listed
    assert "until" in listed
    assert made.output.strip() not in listed
    assert run("tokens", "remove", "hosts", "--file", file).output == "removed hosts\n"
    assert run("tokens", "list", "--file", file).output == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--join", "front"), "must be HOST:PORT"),
        (("--join", "10.0.0.1:50052"), "without TLS"),
        (("--join", "127.0.0.1:50052"), "chmod 600"),
    ],
)
def test_a_host_says_in_one_line_why_it_does_not_join(tmp_path, arguments, message):
    token = tmp_path / "token"
    token.write_text("mjr_secret")
    token.chmod(0o644)
    result = run("rank", *arguments, "--token-file", token)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
