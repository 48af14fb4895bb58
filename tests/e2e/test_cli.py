"""The command line against a running fleet: output for people, JSON and exit codes for scripts."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.fleet_process import MODEL, FleetProcess
from tests.e2e.harness import cortex


def test_status_has_the_format_of_the_reference(fleet: FleetProcess) -> None:
    done = cortex("status", "--endpoint", fleet.url)
    assert done.returncode == 0, done.stderr
    head, _, tail = done.stdout.partition("\n\nModels:\n")
    assert head.startswith("Fleet health: {")
    assert json.loads(head.removeprefix("Fleet health: "))["status"] == "ok"
    assert f"  {MODEL:<40} local(loaded)" in tail.splitlines()


def test_json_is_one_document_and_nothing_else(fleet: FleetProcess) -> None:
    status = json.loads(cortex("status", "--json", "-e", fleet.url).stdout)
    assert status["health"]["nodes"] == {"healthy": 1, "total": 1}
    models = json.loads(cortex("models", "--json", "-e", fleet.url).stdout)
    assert [model["id"] for model in models] == [MODEL] and models[0]["loaded"] is True
    assert "torch" in json.loads(cortex("version", "--json").stdout)


def test_models_is_a_table(fleet: FleetProcess) -> None:
    lines = cortex("models", "-e", fleet.url).stdout.splitlines()
    assert lines[0].split()[:3] == ["MODEL", "STATE", "NODES"]
    assert lines[1].split()[:3] == [MODEL, "loaded", "local"]


def test_chat_answers_words_stdin_and_a_session(fleet: FleetProcess) -> None:
    words = cortex("chat", "-e", fleet.url, MODEL, "What", "is", "12+30?")
    assert words.returncode == 0 and "42" in words.stdout, words.stderr
    assert "first token" in words.stderr
    piped = cortex("chat", "-e", fleet.url, MODEL, "-", stdin="What is 20+21?")
    assert "41" in piped.stdout
    session = cortex("chat", "-e", fleet.url, stdin="What is 1+2?\nWhat is 30+3?\n/bye\n")
    assert session.returncode == 0 and "3" in session.stdout and "33" in session.stdout


def test_unload_and_load(fleet: FleetProcess) -> None:
    unloaded = cortex("unload", MODEL, "-e", fleet.url)
    assert unloaded.returncode == 0 and unloaded.stdout.strip() == f"{MODEL} unloaded on local", unloaded.stderr
    loaded = cortex("load", MODEL, "--node", "local", "--json", "-e", fleet.url)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout)["model"] == MODEL


def test_exit_codes(fleet: FleetProcess, tmp_path: Path) -> None:
    assert cortex("status", "-e", "http://127.0.0.1:9").returncode == 3
    assert cortex("chat", "-e", fleet.url, "no/such", "hi").returncode == 4
    assert cortex("load", "nowhere/to-be-found", "-e", fleet.url).returncode in (1, 4)
    # A load that failed for want of a network stays listed with its reason, until somebody says that it may go.
    assert cortex("unload", "nowhere/to-be-found", "-e", fleet.url).returncode in (0, 4)
    assert cortex("status", "--nonsense").returncode == 2
    broken = tmp_path / "cortex.toml"
    broken.write_text("[gateway]\nlistn = 1\n")
    check = cortex("config", "check", str(broken))
    assert check.returncode == 1 and f"{broken}:2: unknown key `gateway.listn`" in check.stderr
    broken.write_text('[gateway]\nlisten = "127.0.0.1:1"\n')
    assert cortex("config", "check", str(broken)).returncode == 0
    assert cortex("--version").stdout.startswith("cortex, version ")


def test_bench_measures_a_running_fleet(fleet: FleetProcess) -> None:
    arguments = ("bench", MODEL, "-e", fleet.url, "-n", "6", "-c", "3", "--max-tokens", "8", "--ignore-eos", "--json")
    done = cortex(*arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["completed"], report["failed"], report["output_tokens"]) == (6, 0, 48)
    assert 0 < report["first_token_s"]["p50"] <= report["latency_s"]["max"] <= report["duration_s"]
    assert cortex("bench", "no/such-model", "-e", fleet.url, "-n", "1").returncode == 1


def test_top_shows_nodes_and_models(fleet: FleetProcess) -> None:
    shown = cortex("top", "--once", "-e", fleet.url)
    assert shown.returncode == 0, shown.stderr
    assert "local" in shown.stdout and MODEL in shown.stdout and "0 requests in flight" in shown.stdout
    document = json.loads(cortex("top", "--json", "-e", fleet.url).stdout)
    assert [node["name"] for node in document["nodes"]] == ["local"]


def test_logs_tell_what_became_of_requests(fleet: FleetProcess) -> None:
    assert cortex("chat", "-e", fleet.url, MODEL, "What is 1+1?").returncode == 0
    assert cortex("bench", "no/such-model", "-e", fleet.url, "-n", "1").returncode == 1
    lines = [json.loads(line) for line in cortex("logs", "--json", "-e", fleet.url).stdout.splitlines()]
    answered = [line for line in lines if line.get("model") == MODEL and line["outcome"] == "ok"]
    assert answered and answered[-1]["node"] == "local" and answered[-1]["completion_tokens"] > 0
    failed = cortex("logs", "--failed", "--model", "no/such-model", "-e", fleet.url).stdout.splitlines()
    assert failed and all("404" in line and "model_not_found" in line for line in failed)
