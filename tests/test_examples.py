"""Each file of conf.d does what its comment says: the daemon runs on all of them, and each `# try:` is tried.

Only the ports and the directory for UNIX sockets are others than in `make run`, so that both can run at a time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from getpass import getuser
from pathlib import Path

import pytest
import tomli
from harness import Superd

CONF_D = Path(__file__).resolve().parent.parent / "conf.d"
PORT = re.compile(r"(?<=[:/])7\d{3}\b")
# As the comments write it: inside a Python f-string, and for a shell.
SOCKETS = re.compile(r"/tmp/superd-example-(\{os\.getuid\(\)\}|\$\(id -u\))")


@dataclass(frozen=True)
class Example:
    """One file. `tried`, `expect`, `log` and `needs` are the lines of its first comment."""

    name: str
    text: str

    def said(self, word: str) -> str | None:
        found = re.search(rf"^# {word}: +(.*)$", self.text, re.M)
        return found[1].strip() if found else None

    @property
    def enabled(self) -> bool:
        return bool(tomli.loads(self.text).get("enabled", True))


EXAMPLES = [Example(path.stem, path.read_text()) for path in sorted(CONF_D.glob("*.toml"))]
ENABLED = [example for example in EXAMPLES if example.enabled]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Superd]:
    with Superd() as superd:
        for example in EXAMPLES:
            comment, _, keys = example.text.partition("\n\n")
            superd.write(example.name, comment + "\n\n" + PORT.sub("0", keys))
        own = {"SUPERD_EXAMPLES": str(superd.room("sockets")), "USER": getuser()}
        superd.start(environment={**os.environ, **own})
        yield superd


@pytest.mark.parametrize("example", ENABLED, ids=lambda example: example.name)
def test_what_the_comment_says(daemon: Superd, example: Example, require: Callable[[str], str]) -> None:
    expect, log = example.said("expect"), example.said("log")
    assert expect or log, f"{example.name}.toml does not say what happens"
    if tried := example.said("try"):
        tried = SOCKETS.sub(f"{daemon.dir}/sockets", tried)
        if PORT.search(tried):
            tried = PORT.sub(str(daemon.address(example.name)[1]), tried)
        done = subprocess.run([require("bash"), "-c", tried], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert fnmatchcase(done.stdout.strip(), expect or "")
    if log:
        level, _, message = log.partition(": ")
        daemon.wait_record(service=example.name, event="output", level=level, message=message)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_comments(example: Example) -> None:
    assert example.text.startswith("#:schema ../schema/service.json\n# ")
    assert example.enabled != bool(example.said("needs")), "what needs something is not enabled, and says what"
    if not example.enabled:
        assert str(example.said("needs")).endswith(f"superctl enable {example.name}")
        assert example.said("try")


def test_all_of_them_are_in_order() -> None:
    """The ones that are not enabled too, though their programs may not be installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd.cli.check", str(CONF_D)],
        capture_output=True, text=True, env={**os.environ, "USER": getuser()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# The examples that are not enabled, run after all where their programs are installed.


@dataclass
class Trial:
    """`prepare` makes what the example needs in a new directory. Texts of the file and of its `# try:` are replaced."""

    programs: str
    prepare: Callable[[Path], None]
    replaced: dict[str, str]  # {room}: the directory
    expect: str
    tried: dict[str, str]  # the same for the comment; {host} and {port}: where superd listens
    as_root: bool = False


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text)
    path.chmod(mode)


def make_repository(room: Path) -> None:
    git = ["git", "-c", "init.defaultBranch=main", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q", "project.git"], ["-C", "project.git", "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], cwd=room, check=True)
    write(room / "project.git" / ".git" / "git-daemon-export-ok", "")
    subprocess.run(["chown", "-R", "nobody", str(room)], check=os.geteuid() == 0)  # git serves what is its user's


def make_module(room: Path) -> None:
    write(room / "rsyncd.conf", f"use chroot = no\n[things]\npath = {room}\ncomment = many of them\n")


def make_wsgi(room: Path) -> None:
    body = "def application(environ, start):\n    start('200 OK', [])\n    return [b'hello']\n"
    write(room / "app.py", body)


def make_asgi(room: Path) -> None:
    write(
        room / "main.py",
        "async def app(scope, receive, send):\n"
        "    assert scope['type'] == 'http'\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
        "    await send({'type': 'http.response.body', 'body': b'hello'})\n",
    )


def make_certificate(room: Path) -> None:
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {room}/key -out {room}/cert -days 2 -subj /CN=localhost"
    subprocess.run(words.split(), check=True, capture_output=True)
    write(room / "superd.pem", (room / "key").read_text() + (room / "cert").read_text())
    write(
        room / "superd.conf", f"cert = {room}/superd.pem\nexec = /bin/echo\nexecArgs = echo hello\nforeground = quiet\n"
    )


def nothing(room: Path) -> None:
    pass


TRIALS = {
    "finger": Trial(
        "in.fingerd bash", nothing, {}, "*Login*",
        {"finger @127.0.0.1": """bash -c 'exec 3<>/dev/tcp/{host}/{port}; printf "root\\r\\n" >&3; cat <&3'"""},
    ),
    "git": Trial(
        "git", make_repository, {"/srv/git": "{room}"}, "*\tHEAD*",
        {"git clone git://127.0.0.1:9418/project.git": "git ls-remote git://{host}:{port}/project.git"},
    ),
    "gunicorn": Trial(
        "/usr/bin/gunicorn", make_wsgi, {"/srv/app": "{room}"}, "b'hello'", {"127.0.0.1:8000": "{host}:{port}"},
    ),
    "nginx": Trial(
        "nginx curl", nothing, {"/etc/nginx/superd.conf": "{room}/superd.conf"}, "hello*",
        {"127.0.0.1:8080": "{host}:{port}"}, as_root=True,
    ),
    "redis": Trial(
        "redis-server redis-cli", lambda room: room.chmod(0o777),
        {'"--port", "6379"': '"--port", "0", "--unixsocket", "{room}/s"'}, "PONG", {"-p 6379": "-s {room}/s"},
    ),
    "rsync": Trial(
        "rsync", make_module, {"--daemon": "--daemon --config={room}/rsyncd.conf"}, "things*many of them",
        {"127.0.0.1/": "{host}:{port}/"}, as_root=True,
    ),
    "sshd": Trial(
        "sshd ssh-keyscan", nothing, {}, "*ssh-*", {"ssh -p 2222 localhost": "ssh-keyscan -p {port} {host}"},
        as_root=True,
    ),
    "stunnel": Trial(
        "stunnel4 openssl", make_certificate, {"/etc/stunnel": "{room}"}, "hello",
        {"127.0.0.1:7443": "{host}:{port} </dev/null 2>{room}/said"},
    ),
    "tftpd": Trial(
        "in.tftpd tftp", lambda room: write(room / "FILE", "hello"), {"/srv/tftp": "{room}"}, "hello",
        {"tftp 127.0.0.1 -c get FILE": "cd {room} && tftp {host} {port} -c get FILE got >/dev/null && cat got"},
        as_root=True,
    ),
    "uvicorn": Trial("uvicorn curl", make_asgi, {"/srv/app": "{room}"}, "hello", {"127.0.0.1:8001": "{host}:{port}"}),
}  # fmt: skip
NOT_IN_DEBIAN = {"tedge"}


def test_every_example_is_run() -> None:
    assert set(TRIALS) == {example.name for example in EXAMPLES if not example.enabled} - NOT_IN_DEBIAN


@pytest.mark.parametrize("name", TRIALS)
def test_with_its_program(name: str, superd: Superd, require: Callable[[str], str]) -> None:
    trial = TRIALS[name]
    for program in trial.programs.split():
        require(program)
    if trial.as_root and os.geteuid() != 0:
        pytest.skip("needs root")
    (example,) = [example for example in EXAMPLES if example.name == name]
    room = superd.room("room")
    trial.prepare(room)
    comment, _, keys = example.text.partition("\n\n")
    for old, new in trial.replaced.items():
        assert old in keys
        keys = keys.replace(old, new.format(room=room))
    keys = re.sub(r'(?<=")(tcp|udp):(127\.0\.0\.1:)?\d+(?=")', r"\1:127.0.0.1:0", keys)
    superd.write(name, f"{comment}\n\n{keys}")
    superd.write(f"{name}.toml.d/50-enabled", "enabled = true")  # as `superctl enable` does
    superd.start()
    host, port = superd.address(name) if "listen" in tomli.loads(keys) else ("", 0)
    if name == "nginx":  # it is started by the first client, and has to be told the port that superd got
        page = f"server {{ listen {host}:{port}; location / {{ return 200 hello; }} }}"
        write(room / "superd.conf", f"pid {room}/pid; error_log stderr; events {{}} http {{ access_log off; {page} }}")
    superd.wait_for(name, "ready" if name == "redis" else "active")
    tried = str(example.said("try"))
    for old, new in trial.tried.items():
        assert old in tried
        tried = tried.replace(old, new.format(room=room, host=host, port=port))
    with missing_directory("/run/sshd" if name == "sshd" else None):
        done = subprocess.run(["bash", "-c", tried], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and fnmatchcase(done.stdout.strip(), trial.expect), (tried, done, superd.log())


@contextmanager
def missing_directory(path: str | None) -> Iterator[None]:
    """Where only a booted machine has it."""
    made = path is not None and not os.path.exists(path)
    if path is not None and made:
        os.mkdir(path, 0o755)
    try:
        yield
    finally:
        if path is not None and made:
            os.rmdir(path)
