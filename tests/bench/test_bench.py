"""The bench runs, counts what went wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent


def check_load(tmp_path: Path, require: Callable[[str], str], replies: list[bytes]) -> dict[str, Any]:
    """What load.c, for which "good" is right, says of a server that sends `replies`, one to each connection."""
    program = str(tmp_path / "load")
    subprocess.run([require("gcc"), "-Wall", "-Wextra", "-Werror", "-o", program, str(HERE / "load.c")], check=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(reply)

        server = threading.Thread(target=serve)
        server.start()
        command = [program, str(listener.getsockname()[1]), str(len(replies)), "2", "good", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
        server.join()
    *marks, report = done.stdout.decode().splitlines()
    assert marks == ["mark 1"]
    found: dict[str, Any] = json.loads(report)
    return found


def test_load_counts_every_reply_that_is_not_exactly_right(tmp_path: Path, require: Callable[[str], str]) -> None:
    found = check_load(tmp_path, require, [b"good", b"goo", b"goods", b"evil", b"", b"good"])
    assert (found["connections"], found["failed"]) == (6, 4)


def test_load_is_content_with_right_replies(tmp_path: Path, require: Callable[[str], str]) -> None:
    found = check_load(tmp_path, require, [b"good"] * 5)
    assert (found["failed"], found["first_error"]) == (0, "")
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the bench needs root: services run as nobody")
@pytest.mark.quiet
def test_a_quick_run_prints_its_tables(tmp_path: Path, require: Callable[[str], str]) -> None:
    for program in ("gcc", "tcpserver"):
        require(program)
    figures = tmp_path / "figures.json"
    bench = [sys.executable, str(HERE / "run.py"), "--quick", "--json", str(figures)]
    what = ["--only", "superd,tcpserver", "--parts", "rates,kill,leak,first"]
    done = subprocess.run([*bench, *what], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert not found["broken"] and not found["left_out"]
    assert {(each["peer"], each["concurrency"]) for each in found["rounds"]} == {
        (peer, concurrency) for peer in ("superd", "tcpserver") for concurrency in (1, 16, 64)
    }
    assert sum(each["failed"] for each in found["rounds"]) == 0
    assert (found["kill"]["failed"], found["kill"]["kills"]) == (0, 2)
    assert found["leak"]["fd_changes"] == found["leak"]["zombies"] == []
    assert {len(times) for times in found["first"].values()} == {3} and "superd" in found["first"]
    assert "| superd : peer" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="the bench needs root: services run as nobody")
@pytest.mark.quiet
def test_scale_prints_its_tables_and_draws_its_curves(tmp_path: Path, require: Callable[[str], str]) -> None:
    require("gcc")
    bench = [sys.executable, str(HERE / "run.py"), "--scale", "--quick", "--sizes", "3,20", "--live", "2,9"]
    bench += ["--rates", "50,100"]
    done = subprocess.run(
        [*bench, "--curves", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    rates = ["conn/s", "-" * 8, "50", "100"]
    assert rows == ["services", "-" * 10, "3 unix", "20 unix", "3 tcp", "20 tcp", "live", "-" * 6, "2", "9", *rates]
    drawn = {path.stem: ElementTree.parse(path).getroot() for path in tmp_path.glob("*.svg")}
    assert sorted(drawn) == [
        "accept",
        "change",
        "live-accept",
        "live-memory",
        "memory",
        "rate-cpu",
        "rate-latency",
        "start",
    ]
    for name, image in drawn.items():
        lines = image.findall("{http://www.w3.org/2000/svg}polyline")
        assert [len(line.attrib["points"].split()) for line in lines] == [2] * (
            1 if name.startswith("live") or name == "rate-cpu" else 2
        )
