"""superctl metrics, and metrics --http as a service of superd: parsers, promtool, curl and a browser read it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, ask, eventually, fetch, toml
from prometheus_client.parser import text_string_to_metric_families

CTL = [sys.executable, "-I", "-m", "superd.cli.superctl"]


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as superd:
        http = [*CTL, "-s", superd.control, "metrics", "--http"]
        who = {"user": "root"} if os.geteuid() == 0 else {}
        superd.write("metrics", toml(listen="tcp:127.0.0.1:0", command=http, **who))
        superd.write("hello", toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", "hello"]))
        superd.write("fails", toml(run="once", command=["/bin/sh", "-c", "exit 3"]))
        yield superd


def text(superd: Superd) -> str:
    return str(superd.call("Metrics")["text"])


def values(superd: Superd) -> dict[str, float]:
    """Samples as `name{label="value",…}`, labels in order."""
    found = {}
    for family in text_string_to_metric_families(text(superd)):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def get(superd: Superd, path: str, head: str = "", method: str = "GET") -> tuple[int, dict[str, str], str]:
    answer = ask(superd.connect("metrics"), f"{method} {path} HTTP/1.0\r\n{head}\r\n".encode()).decode()
    top, _, body = answer.partition("\r\n\r\n")
    status, *lines = top.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def test_numbers(superd: Superd, require: Callable[[str], str]) -> None:
    superd.write(
        "full", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", limits={"max_connections": 1, "on_full": "refuse"})
    )
    superd.start()
    superd.wait_record(service="fails", event="exit")
    for _ in range(3):
        assert fetch(superd.connect("hello")) == b"hello\n"
    superd.wait_records(3, service="hello", event="exit")
    with superd.connect("full") as held:
        superd.wait_record(service="full", event="start")
        assert fetch(superd.connect("full")) == b""
        found = values(superd)
        assert found['superd_connections{service="full"}'] == 1
        held.close()
    assert found['superd_connections_accepted_total{service="hello"}'] == 3
    assert found['superd_service_exits_total{result="success",service="hello"}'] == 3
    assert found['superd_service_exits_total{result="status",service="fails"}'] == 1
    assert found['superd_connections_refused_total{reason="full",service="full"}'] == 1
    assert found['superd_service_state{service="fails",state="failed"}'] == 1
    assert found['superd_services{state="listening"}'] == 3
    assert found['superd_start_duration_seconds_count{service="hello"}'] == 3
    assert 0 < found['superd_start_duration_seconds_sum{service="hello"}'] < 3 * TIMEOUT_S
    assert found['superd_connection_duration_seconds_bucket{le="+Inf",service="hello"}'] == 3
    assert found['superd_service_memory_bytes{service="full"}'] > 100_000
    assert found['superd_role_memory_bytes{role="manager"}'] > 1_000_000
    assert any(name.startswith("superd_listener_queue_limit{") for name in found)
    assert found["superd_manager_generation"] == 1
    assert "127.0.0.1:" not in re.sub(r'listen="[^"]*"', "", text(superd)), "no peer in a label"


def test_promtool_has_nothing_to_say(superd: Superd) -> None:
    from shutil import which

    promtool = which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    superd.start()
    fetch(superd.connect("hello"))
    superd.wait_record(service="hello", event="exit")
    done = subprocess.run([promtool, "check", "metrics"], input=text(superd), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_counters_go_on_after_the_death_of_a_manager(superd: Superd) -> None:
    superd.start()
    for _ in range(3):
        fetch(superd.connect("hello"))
    superd.wait_records(3, service="hello", event="exit")
    began = values(superd)["superd_start_time_seconds"]
    # A deposit follows within a second or so of the last one that was counted; what counts is that it does.
    keeper = f"/proc/{superd.pid}/fd"

    def deposited() -> bool:
        for fd in os.listdir(keeper):
            try:
                if "superd-snapshot" in os.readlink(f"{keeper}/{fd}"):
                    left = json.loads(Path(f"{keeper}/{fd}").read_text())
                    return left["services"]["hello"]["total"] == 3
            except (OSError, ValueError, KeyError):
                continue
        return False

    eventually(deposited, True)
    superd.kill_role("superd-manager")
    fetch(superd.connect("hello"))
    superd.wait_records(4, service="hello", event="exit")
    found = values(superd)
    assert found["superd_manager_generation"] == 2
    assert found['superd_connections_accepted_total{service="hello"}'] == 4
    assert found['superd_service_exits_total{result="success",service="hello"}'] == 4
    assert found['superd_connection_duration_seconds_count{service="hello"}'] == 4
    assert found["superd_start_time_seconds"] == began
    assert superd.call("History")["services"][0]["connections"][-2:].count(0) <= 1


def test_over_http(superd: Superd) -> None:
    superd.start()
    superd.wait_record(service="fails", event="exit")
    status, headers, body = get(superd, "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert int(headers["Content-Length"]) == len(body.encode())
    assert "superd_build_info" in {family.name for family in text_string_to_metric_families(body)}
    assert get(superd, "/livez")[::2] == (200, "ok")
    status, _, body = get(superd, "/readyz")
    assert status == 503
    assert body.splitlines() == [
        "[+]superd ok",
        "[-]fails failed",
        "[+]hello ok",
        "[+]metrics ok",
        "readyz check failed",
    ]
    assert get(superd, "/livez?verbose")[2] == "[+]superd ok\nlivez check passed\n"
    superd.call("Stop", names=["fails"])
    assert get(superd, "/readyz")[::2] == (200, "ok")
    assert get(superd, "/nothing")[0] == 404
    status, headers, body = get(superd, "/", method="POST", head="Content-Length: 0\r\n")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    status, headers, body = get(superd, "/metrics", method="HEAD")
    assert status == 200 and body == "" and int(headers["Content-Length"]) > 1000
    assert not superd.find_records(service="metrics", event="output")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"\r\nGET /livez HTTP/1.0\n\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET /\x00 HTTP/1.0\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n folded: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n", 400),
        (b"GET / HTTP/1.0\r\nX: " + b"x" * 20_000, 431),
        (b"GET /../../etc/passwd HTTP/1.0\r\n\r\n", 404),
        (b"DELETE /metrics HTTP/1.0\r\n\r\n", 405),
    ],
)
def test_requests(request_: bytes, status: int) -> None:
    """By itself, on a socket pair: no superd, so what is right is answered with 503."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [*CTL, "-s", "/nonexistent/superd.sock", "metrics", "--http"]
        child = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True)
        theirs.close()
        ours.settimeout(TIMEOUT_S)
        answer = ask(ours, request_)
        _, said = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0
    assert answer.startswith(b"HTTP/1.1 %d " % (503 if status == 200 else status)), answer
    assert (said == "") == (status != 200), said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have groups")
def test_as_the_manual_has_it(require: Callable[[str], str]) -> None:
    """Two lines and a group: as nobody, with the right to look and no other."""
    with Superd() as superd:
        # The Python of the tests may be one that nobody can read.
        here = Path(__file__).resolve().parents[2]
        program = superd.dir / "superctl"
        program.write_text(
            f"#!{PYTHON} -I\nimport sys\nsys.path.insert(0, {str(superd.dir)!r})\n"
            "from superd.cli.superctl import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
        shutil.copytree(here / "superd", superd.dir / "superd", ignore=shutil.ignore_patterns("__pycache__"))
        superd.write_daemon(toml(control_group="staff"))
        superd.write("metrics", toml(listen="tcp:127.0.0.1:0", command=f"{program} metrics --http", group="staff"))
        superd.start()
        assert get(superd, "/readyz")[::2] == (200, "ok")
        assert "superd_build_info" in get(superd, "/metrics")[2]


def test_a_client_that_only_looks(superd: Superd) -> None:
    superd.start()
    assert ask(superd.connect("metrics"), b"") == b""
    assert superd.wait_record(service="metrics", event="exit")["status"] == 0


# --- the page, in a browser


def browse(require: Callable[[str], str], superd: Superd, *options: str) -> str:
    host, port = superd.address("metrics")
    argv = [
        require("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={superd.dir}/browser", *options, f"http://{host}:{port}/",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": str(superd.dir)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_in_a_browser(superd: Superd, require: Callable[[str], str]) -> None:
    superd.write("markup", toml(run="once", command=["/nonexistent/<script>document.title='x'</script>"]))
    superd.start()
    superd.wait_record(service="fails", event="exit")
    fetch(superd.connect("hello"))
    superd.wait_record(service="hello", event="exit")
    page = browse(require, superd, "--dump-dom")
    assert re.search(r"<title>2 problems – superd on ", page)
    states = re.findall(r"<b>([\w-]+)</b><span class=\"state \w+\">. ([\w ]+)</span>", page)
    assert states[:2] == [("fails", "failed"), ("markup", "bad config")], "what is wrong comes first"
    assert {name for name, _ in states} == {"fails", "markup", "hello", "metrics"}
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page), "nothing from elsewhere"
    # Of the size of a phone and of a desk: there is something on it, and not the same.
    sizes = {}
    for width, height in ((500, 900), (1200, 800)):
        shot = superd.dir / f"{width}.png"
        browse(require, superd, f"--window-size={width},{height}", f"--screenshot={shot}")
        data = shot.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (width, height)
        sizes[width] = len(data)
    assert min(sizes.values()) > 10_000


def test_a_page_of_nothing_and_of_much() -> None:
    from superd.cli import page

    empty = page.render([], [], {"slot": 10.0, "span": 600.0, "services": []}, "h", "1")
    assert "No services" in empty
    row = {"state": "ready", "for": 90000.0, "now": 0, "total": 0, "restarts": 1, "listen": ["tcp:1"] * 9, "note": ""}
    rows = [{**row, "name": f"service-{number}"} for number in range(300)]
    much = page.render(rows, [], {"slot": 10.0, "span": 600.0, "services": []}, "<h>", "1")
    assert much.count("<li>") == 300 and "and 5 more" in much and "1 restart<" in much and "&lt;h&gt;" in much
    assert len(much) < 300 * 600
