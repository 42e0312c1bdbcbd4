"""What probes and Prometheus are told of a process, by the process as it is."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from cauce.cli import main
from cauce.errors import Refused
from cauce.ext.http import parse_address
from cauce.ext.prometheus import NAMES

ROOT = Path(__file__).parent.parent
MAIN = "from cauce.cli import main; main()"

SERVICE = """
import time, asyncio
from cauce import Command, Domain, Event, Query, Record, Retry, Service

jobs = Domain("jobs", key="name")

class Job(Record, domain=jobs):
    name: str

class Done(Event, domain=jobs):
    name: str

class Do(Command, domain=jobs):
    name: str

class Which(Query[str], domain=jobs):
    name: str

owner = Service("jobs", owns=jobs)

@owner.decide
def do(job: Job | None, command: Do) -> Done:
    return Done(command.name)

@owner.evolve
def done(job: Job | None, event: Done) -> Job:
    return Job(event.name)

@owner.answer
async def which(query: Which) -> str:
    if query.name == "bad":
        raise ValueError(query.name)
    return query.name

worker = Service("worker")

@worker.on(retry=Retry(attempts=1))
async def work(event: Done) -> None:
    if event.name == "block":
        time.sleep(600)
    if event.name == "bad":
        raise ValueError('a "quoted" name')
    if event.name == "long":
        await asyncio.sleep(600)
"""


class Process:
    """`cauce run` in a process of its own, and what it answers over HTTP."""

    def __init__(self, folder: Path, *arguments: str, bus: str = "sqlite:///bus.db") -> None:
        (folder / "jobs_module.py").write_text(SERVICE)
        self.folder, self.bus = folder, bus
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "run", "jobs_module", "--bus", bus, *arguments],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said = ""
        self.port = 0

    def until_said(self, pattern: str) -> re.Match[str]:
        """Read what it says until that is met."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + 60
        while (found := re.search(pattern, self.said)) is None:
            assert time.monotonic() < deadline, self.said
            ready, _, _ = select.select([self.process.stderr], [], [], 1.0)
            if ready:
                chunk = os.read(self.process.stderr.fileno(), 65_536)
                assert chunk, self.said
                self.said += chunk.decode()
        return found

    def ask(self, path: str, timeout: float = 30.0, **headers: str) -> tuple[int, str]:
        self.port = self.port or int(self.until_said(r"answering http://127\.0\.0\.1:(\d+)/")[1])
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def until(self, path: str, holds: Callable[[int, str], bool]) -> str:
        deadline = time.monotonic() + 60
        while not holds(*(found := self.ask(path))):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found[1]

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of one sample; None if there is none."""
        code, text = self.ask("/metrics")
        assert code == 200
        return value_of(text, name, **labels)

    def until_metric(self, wanted: float, name: str, **labels: str) -> None:
        deadline = time.monotonic() + 60
        while (found := self.metric(name, **labels)) != wanted:
            assert time.monotonic() < deadline, (name, labels, found)
            time.sleep(0.05)

    def call(self, name: str, *, ask: bool = False) -> None:
        """From another process: a command, or a question."""
        text = (
            "import asyncio, sys, jobs_module as m\nfrom cauce import connect, CauceError\n"
            "async def main():\n    async with connect(sys.argv[2]) as bus:\n"
            f"        try: await bus.{'ask(m.Which' if ask else 'call(m.Do'}(sys.argv[1]), timeout=30)\n"
            "        except CauceError: pass\n"
            "asyncio.run(main())"
        )
        subprocess.run(
            [sys.executable, "-c", text, name, self.bus], cwd=self.folder, check=True, timeout=60,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"},
        )  # fmt: skip

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def value_of(text: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a process that answers; it does not outlive the test."""
    started: list[Process] = []

    def one(*arguments: str, **more: Any) -> Process:
        started.append(Process(tmp_path, *arguments, **more))
        return started[-1]

    yield one
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_a_process_is_ready_when_all_its_services_run_and_not_while_it_drains(start: Callable[..., Process]) -> None:
    process = start("--http", "0", "--drain", "30")
    assert process.ask("/livez") == (200, "ok\n")
    assert process.until("/readyz", lambda code, _: code == 200) == "ok\n"
    code, told = process.ask("/readyz", Accept="application/json")
    assert (code, json.loads(told)) == (200, {"ok": True, "reasons": []})
    # One handler is at work for a while: so the end takes as long.
    process.call("long")
    process.until_metric(1, "cauce_messages_in_flight", service="worker", handler="work")
    process.process.send_signal(signal.SIGTERM)
    # One service after the other says so.
    told = process.until("/readyz", lambda code, told: code == 503 and "worker" in told)
    assert "worker is draining" in told
    assert process.ask("/livez") == (200, "ok\n"), "who drains lives"
    code, told = process.ask("/readyz", Accept="application/json")
    assert (code, json.loads(told)["ok"]) == (503, False)


def test_a_blocked_loop_is_told_by_the_process_itself(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    process.until("/readyz", lambda code, _: code == 200)
    process.call("block")
    told = process.until("/livez", lambda code, _: code == 503)
    assert "has not ticked" in told
    assert process.ask("/readyz")[0] == 503
    late = process.metric("cauce_loop_late_seconds")
    assert late is not None
    assert late > 9
    assert process.metric("cauce_messages_in_flight", service="worker", handler="work") == 1


def test_metrics_count_what_was_handled_failed_and_parked_asked_and_answered(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    process.until("/readyz", lambda code, _: code == 200)
    for name in ("a", "b", "bad"):
        process.call(name)
    process.call("a", ask=True)
    process.call("bad", ask=True)
    worker = {"service": "worker", "handler": "work"}
    process.until_metric(2, "cauce_messages_handled_total", **worker)
    process.until_metric(1, "cauce_messages_parked_total", **worker)
    assert process.metric("cauce_messages_failed_total", **worker) == 1
    assert process.metric("cauce_handler_seconds_count", **worker) == 3
    assert process.metric("cauce_handler_seconds_bucket", le="+Inf", **worker) == 3
    asked = {"service": "jobs", "domain": "jobs"}
    assert process.metric("cauce_questions_answered_total", kind="call", type="Do", outcome="answered", **asked) == 3
    assert process.metric("cauce_questions_answered_total", kind="ask", type="Which", outcome="answered", **asked) == 1
    assert process.metric("cauce_questions_answered_total", kind="ask", type="Which", outcome="failed", **asked) == 1
    assert process.metric("cauce_instance_up", service="jobs", state="running") == 1
    assert process.metric("cauce_instance_up", service="jobs", state="draining") == 0
    process.until_metric(1, "cauce_consumer_dead", service="worker", consumer="work")
    assert process.metric("cauce_consumer_lag_messages", service="worker", consumer="work") == 0
    assert process.metric("cauce_log_head", log="facts") is not None


def test_on_each_backend_it_is_ready_and_tells_lags(start: Callable[..., Process], each_bus: str) -> None:
    process = start("--http", "0", bus=each_bus)
    process.until("/readyz", lambda code, _: code == 200)
    process.call("a")
    process.until_metric(1, "cauce_messages_handled_total", service="worker", handler="work")
    process.until_metric(0, "cauce_consumer_lag_messages", service="worker", consumer="work")
    process.until_metric(0, "cauce_consumer_lag_messages", service="jobs", consumer="decide jobs")
    head = process.metric("cauce_log_head", log="facts")
    assert head is not None
    assert head > 0
    assert process.end() == 0
    assert "Traceback" not in process.said


def test_the_text_is_what_prometheus_reads_and_holds_every_metric_once(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    process.until("/readyz", lambda code, _: code == 200)
    process.call("a")
    _, text = process.ask("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = {name.removesuffix("_total") if NAMES[name][0] == "counter" else name for name in NAMES}
    assert set(families) == names
    for name, family in families.items():
        assert family.type == NAMES.get(name, NAMES.get(f"{name}_total"))[0]  # type: ignore[index]
        assert family.documentation
    labels = {key for family in families.values() for sample in family.samples for key in sample.labels}
    assert labels <= {
        "version", "python", "service", "state", "handler", "domain", "kind", "type", "outcome", "callee", "consumer",
        "log", "le", "bulkhead",
    }  # fmt: skip
    assert len(text.splitlines()) == len(set(text.splitlines()))


def test_types_that_nobody_knows_are_counted_as_one(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    process.until("/readyz", lambda code, _: code == 200)
    text = """
import asyncio, sys
from cauce.backends import open_backend
from cauce.clock import SystemClock
async def main():
    clock = SystemClock()
    bus = await open_backend('sqlite:///bus.db', clock)
    for n in range(50):
        await bus.wire.ask('jobs', b'{"kind": "k%d", "type": "T%d\\\\n"}' % (n, n), clock.monotonic() + 30)
    await bus.wire.ask('jobs', b'no json', clock.monotonic() + 30)
    await bus.close()
asyncio.run(main())
"""
    subprocess.run(
        [sys.executable, "-c", text], cwd=process.folder, check=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    _, told = process.ask("/metrics")
    answered = [
        sample.labels["type"]
        for family in text_string_to_metric_families(told)
        for sample in family.samples
        if sample.name == "cauce_questions_answered_total"
    ]
    assert set(answered) == {"other"}
    assert process.metric("cauce_questions_answered_total", type="other", outcome="failed") == 51


def test_pages_in_a_browser_are_told_nothing(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    assert process.ask("/metrics", Host="evil.example")[0] == 403
    assert process.ask("/metrics", Host="evil.example:80")[0] == 403
    assert process.ask("/metrics", Origin="https://evil.example")[0] == 403
    assert process.ask("/metrics", Host="localhost:1234")[0] == 200
    assert process.ask("/metrics", Host="[::1]:1234")[0] == 200
    assert process.ask("/other")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=30)
    connection.request("POST", "/livez", body=b"{}")
    assert connection.getresponse().status == 501
    connection.close()


def test_those_who_never_come_to_the_end_of_their_request_keep_no_probe_out(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    process.ask("/livez")
    many = list[socket.socket]()
    for _ in range(80):
        many.append(socket.create_connection(("127.0.0.1", process.port)))
        many[-1].sendall(b"GET /livez HTTP/1.0\r\n")
        time.sleep(0.01)  # As fast as they are taken: else those that are not heard of yet wait in the kernel.
    for n in range(5):
        for each in many:
            with contextlib.suppress(OSError):
                each.sendall(b"X: y\r\n")
        assert process.ask("/livez")[0] == 200, n
    tasks = Path(f"/proc/{process.process.pid}/task")
    assert len(list(tasks.iterdir())) < 60, "and no thread is left for each of them"
    for each in many:
        each.close()


def test_a_port_that_is_taken_is_refused_before_anything_runs(start: Callable[..., Process], tmp_path: Path) -> None:
    first = start("--http", "0")
    first.ask("/livez")
    second = start("--http", str(first.port))
    assert second.process.wait(60) == 1
    assert "name another with --http" in second.until_said("error.*\n")[0]


def test_each_process_of_many_has_a_port_of_its_own(start: Callable[..., Process]) -> None:
    process = start("--http", "0", "--each")
    deadline = time.monotonic() + 60
    while len(found := dict(re.findall(r"(\w+): answering http://127\.0\.0\.1:(\d+)/", process.said))) < 2:
        assert time.monotonic() < deadline, process.said
        process.until_said(rf"(?s){re.escape(process.said)}.+")
    assert len(set(found.values())) == 2
    for port in found.values():
        process.port = int(port)
        process.until("/readyz", lambda code, _: code == 200)
    assert process.end() == 0


def test_an_address_to_listen_at_is_a_port_or_says_its_host() -> None:
    assert parse_address("9090") == ("127.0.0.1", 9090)
    assert parse_address("0.0.0.0:9090") == ("0.0.0.0", 9090)  # noqa: S104 - nothing listens there
    assert parse_address("[::1]:0") == ("::1", 0)
    for wrong in ("", "x", ":80", "host:", "65536", "-1", "1.2.3.4", "٣"):
        with pytest.raises(Refused, match="write PORT"):
            parse_address(wrong)


def test_the_process_ends_as_it_should_with_http_on(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    process.until("/readyz", lambda code, _: code == 200)
    process.until_metric(0, "cauce_consumer_lag_messages", service="worker", consumer="work")
    assert process.end() == 0
    assert "Traceback" not in process.said


def test_each_line_of_a_json_log_is_an_object_that_says_because_of_what(start: Callable[..., Process]) -> None:
    process = start("--http", "0", "--log-format", "json", "--each")
    process.until("/livez", lambda code, _: code == 200)
    process.until_said("running worker")
    process.call("bad")
    process.until_said("dead letter")
    assert process.end() == 0
    assert process.process.stderr is not None
    process.said += process.process.stderr.read().decode()
    found = [json.loads(line) for line in process.said.splitlines()]
    assert {line["level"] for line in found} >= {"INFO", "ERROR"}
    (dead,) = (line for line in found if "dead letter" in line["message"])
    assert (dead["service"], dead["handler"], dead["stream"]) == ("worker", "work", "jobs/bad")
    assert dead["position"] > 0
    assert dead["correlation"]
    assert dead["message_id"]


def test_an_instance_that_is_stopped_keeps_nobody_from_looking(start: Callable[..., Process]) -> None:
    process = start("--http", "0")
    # First places are written behind.
    process.until_metric(0, "cauce_consumer_lag_messages", service="worker", consumer="work")
    process.until_metric(0, "cauce_consumer_lag_messages", service="jobs", consumer="decide jobs")
    look = ["consumers", "--window", "0", "--json", "--bus", f"sqlite:///{process.folder}/bus.db"]
    before = json.loads(CliRunner().invoke(main, look).output)["consumers"]
    assert {each["in_flight"] for each in before} == {0}
    process.process.send_signal(signal.SIGSTOP)
    # A signal takes its time.
    os.waitid(os.P_PID, process.process.pid, os.WSTOPPED | os.WNOWAIT)
    stopped = json.loads(CliRunner().invoke(main, look).output)["consumers"]
    assert [(each["name"], each["lag"]) for each in stopped] == [(each["name"], each["lag"]) for each in before]
    assert {each["in_flight"] for each in stopped} == {None}
    process.process.send_signal(signal.SIGCONT)


def test_every_alert_names_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "how-to" / "alerts.md").read_text()
    blocks = re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == len(re.findall(r"^## ", page, re.MULTILINE)) == 6
    known = set(NAMES) | {f"{name}_{end}" for name in NAMES for end in ("bucket", "sum", "count")}
    for block in blocks:
        named = set(re.findall(r"\bcauce_\w+", block))
        assert named
        assert named <= known
        for label in re.findall(r'(\w+)="', block):
            assert label == "state"


def test_the_page_of_metrics_tells_of_each_and_of_no_other() -> None:
    page = (ROOT / "docs" / "reference" / "seeing.md").read_text()
    table = page.partition("## Metrics")[2].partition("\n## ")[0]
    told = set(re.findall(r"`(cauce_\w+)`", table))
    told |= {f"cauce_messages_{end}" for end in re.findall(r"`…_(\w+)`", table)}
    assert told == set(NAMES)
