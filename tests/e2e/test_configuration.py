"""Files with errors, addresses that are taken, and --strict, as superd itself treats them at start."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from harness import Superd, ask, toml

CAT = toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"])

BAD = {
    "empty": "",
    "cut short": 'listen = "tcp:0"\ncommand = ["/bin/ca',
    "misspelt": 'listen = "tcp:0"\ncomand = "/bin/cat"',
    "no program": 'listen = "tcp:0"\ncommand = "/nonexistent"',
    "a limit of 0": CAT + "[limits]\nmax_connections = 0",  # B5
    "not UTF-8": 'description = "\xff"\n' + CAT,
    "wrong address": 'listen = "tcp:127.0.0.1:99999"\ncommand = "/bin/cat"',
    "unknown user": CAT + 'user = "0day"',  # E10
    "a number for a user": CAT + 'user = "1000"',
    "reserved variable": CAT + 'environment = { LISTEN_FDS = "1" }',
    "empty path": 'listen = "unix:"\ncommand = "/bin/cat"',  # D9
    "a path too long": f'listen = "unix:/{"x" * 120}"\ncommand = "/bin/cat"',  # D8
    "a key of another mode": CAT + 'run = "on-demand"\n[limits]\nmax_connections = 3',
    "nested": "a = " + "[" * 500,  # F14
}


@pytest.mark.parametrize("what", BAD)
def test_one_bad_file(superd: Superd, what: str) -> None:  # K10 K12
    """It is told with its place and shown in its state; the good ones beside it run."""
    superd.garbage_expected = True
    superd.write("a", CAT)
    superd.write("z", CAT)
    path = superd.write("bad", "")
    path.write_bytes(BAD[what].encode("latin-1"))
    superd.start()
    for name in ("a", "z"):
        assert ask(superd.connect(name), b"x") == b"x"
    row = superd.status("bad")
    assert row["state"] == "bad config" and row["note"]
    text = superd.log()
    assert re.search(r"error(\[[\w-]+\])?: ", text) and "bad.toml" in text and "Traceback" not in text
    health = superd.call("Health")
    assert not health["ready"] and health["problems"][0].startswith("bad: bad config")


def test_strict_and_a_bad_file(superd: Superd) -> None:
    superd.garbage_expected = True
    superd.write("a", toml(listen=f"unix:{superd.dir}/a.sock", command=["/bin/cat"]))
    superd.write("bad", "listen = 1")
    superd.launch("--strict")
    assert superd.wait_exit() == 78
    assert not (superd.dir / "a.sock").exists()
    assert "bad.toml" in superd.log() and not superd.find_records(event="ready")


def test_strict_and_a_busy_port(superd: Superd) -> None:
    """It stops again what it had begun, and the message says who has the port."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        superd.write("a", toml(listen=f"unix:{superd.dir}/a.sock", command=["/bin/cat"]))
        superd.write("b", toml(listen=f"tcp:127.0.0.1:{port}", command=["/bin/cat"]))
        superd.launch("--strict")
        assert superd.wait_exit() == 71
    assert re.search(rf"cannot bind tcp:127.0.0.1:{port}: .*pid \d+ \(", superd.log())
    assert not (superd.dir / "a.sock").exists() and not superd.find_records(event="ready")


def test_strict_and_all_well(superd: Superd) -> None:
    superd.write("a", CAT)
    superd.start("--strict")
    assert ask(superd.connect("a"), b"x") == b"x"


def test_two_services_one_port(superd: Superd) -> None:  # A12
    """On different addresses of one port there is no conflict, on the wildcard there is."""
    superd.garbage_expected = True
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    superd.write("a", toml(listen=f"tcp:127.0.0.1:{port}", command=["/bin/cat"]))
    superd.write("b", toml(listen=f"tcp:127.0.0.2:{port}", command=["/bin/cat"]))
    superd.write("c", toml(listen=f"udp:127.0.0.1:{port}", command=["/bin/true"]))
    superd.start()
    for name in ("a", "b"):
        assert ask(superd.connect(name), b"x") == b"x"
    assert superd.status("c")["state"] == "listening"


def test_disabled(superd: Superd) -> None:
    path = superd.dir / "a.sock"
    superd.write("a", toml(listen=f"unix:{path}", command=["/bin/cat"], enabled=False))
    superd.start()
    assert superd.status("a")["state"] == "disabled" and not path.exists()
    assert superd.call("Health")["ready"]


def test_nothing_to_do(superd: Superd) -> None:
    assert superd.start()["message"] == "ready: 0 services, 0 sockets"
    assert superd.call("List")["services"] == []


@pytest.mark.parametrize("argument", ["--nonsense", "-c/nonexistent", "--control=tcp:127.0.0.1:1", "--control="])  # J2
def test_wrong_usage(argument: str) -> None:
    done = subprocess.run([sys.executable, "-I", "-m", "superd", argument], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("superd: ")


def test_configuration_in_force_outlives_the_manager(superd: Superd) -> None:
    """A manager that follows another has the configuration that was read, not the files as somebody is editing them."""
    superd.garbage_expected = True
    superd.write("a", CAT)
    superd.start("--no-watch")
    address = superd.address("a")
    superd.write("a", "half a fi")
    superd.write("new", CAT)
    superd.kill_role("superd-manager", signal.SIGKILL)
    superd.wait_record(message=re.compile("took over"))
    assert [row["name"] for row in superd.call("List")["services"]] == ["a"]
    assert superd.address("a") == address
    assert ask(superd.connect("a"), b"x") == b"x"


def test_how_long_a_file_has_been_wrong(superd: Superd) -> None:
    """`for` is the time of the error: a file that is dropped in a day after the start has not been wrong for a day."""
    superd.garbage_expected = True
    superd.write("first", "")
    superd.start("--no-watch")
    superd.write("second", "")
    superd.call("Reload")
    first, second = superd.status("first"), superd.status("second")
    assert first["state"] == second["state"] == "bad config"
    assert first["for"] > second["for"] and first["since"] < second["since"]
    superd.call("Reload")
    assert superd.status("second")["since"] == second["since"], "the same error as before"


@pytest.mark.parametrize("verb", ["Start", "Restart"])
def test_program_that_is_installed_later(superd: Superd, verb: str) -> None:
    """Who has installed what the message says is missing, and starts the service, does not hear it again. What its file
    says is not looked at: nobody has asked for that."""
    superd.garbage_expected = True
    room = superd.room("opt")
    superd.write("late", toml(listen="tcp:127.0.0.1:0", command=[str(room / "cat")]))
    superd.start("--no-watch")
    assert superd.status("late")["state"] == "bad config"
    result = superd.call(verb, names=["late"])["results"][0]
    assert not result["ok"] and "there is no program" in result["note"]
    shutil.copy("/bin/cat", room / "cat")
    superd.write("late", "listen = 1")
    assert superd.call(verb, names=["late"])["results"][0]["ok"]
    assert ask(superd.connect("late"), b"x") == b"x"
