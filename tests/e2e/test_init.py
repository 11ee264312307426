"""superd -- COMMAND without -c: a plain init, seen by the command and by whoever started superd."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, comm, descendants, wait_gone

from superd.init import CATCHABLE

SUPERD = [sys.executable, "-I", "-m", "superd"]
Require = Callable[[str], str]

# Prints each signal that it gets, and ends at the second INT in a row.
PRINT_SIGNALS = """
import signal
got = {*range(1, 65)} - {9, 19, 17, 32, 33}
signal.pthread_sigmask(signal.SIG_BLOCK, got)
print("ready", flush=True)
while True:
    print(signal.sigwait(got), flush=True)
"""


def init(*command: str, options: tuple[str, ...] = (), wrapper: tuple[str, ...] = (), **more: Any) -> tuple[int, str]:
    """(exit status, stdout and stderr)."""
    done = subprocess.run(
        [*wrapper, *SUPERD, *options, "--", *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, text=True,
        **more,
    )  # fmt: skip
    return done.returncode, done.stdout


@contextlib.contextmanager
def started(*command: str, options: tuple[str, ...] = (), **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Killed with everything below it in the end."""
    process = subprocess.Popen([*SUPERD, *options, "--", *command], stdout=subprocess.PIPE, bufsize=0, **more)
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], TIMEOUT_S)[0]
    return process.stdout.readline().decode().rstrip("\n")


# --- exit statuses


def test_exit_statuses() -> None:  # H5 G12
    codes = [*range(0, 256, 16), 1, 2, 125, 126, 127, 129, 137, 143, 254, 255]
    running = [subprocess.Popen([*SUPERD, "--", "/bin/sh", "-c", f"exit {code}"]) for code in codes]
    assert [process.wait(TIMEOUT_S) for process in running] == codes


@pytest.mark.parametrize("signo", [1, 2, 3, 6, 9, 11, 15, 34, 64])
def test_a_command_that_is_killed(signo: int) -> None:  # H5 G12
    assert init("/bin/sh", "-c", f"ulimit -c 0; kill -{signo} $$")[0] == 128 + signo


def test_a_command_that_cannot_be_executed(tmp_path: Path) -> None:  # H5 E12
    (tmp_path / "script").write_text("exit 0\n")
    (tmp_path / "text").write_text("exit 0\n")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "lost").write_text("#!/nonexistent/interpreter\n")
    (tmp_path / "lost").chmod(0o755)
    for command, status, reason in (
        ("nonexistent-program", 127, "no such file or directory"),
        ("/nonexistent/program", 127, "no such file or directory"),
        ("", 127, "no such file or directory"),
        ("/etc/passwd/x", 127, "not a directory"),
        (str(tmp_path), 126, "permission denied"),
        (str(tmp_path / "text"), 126, "permission denied"),
        (str(tmp_path / "script"), 126, "exec format error"),
        (str(tmp_path / "lost"), 127, "no such file or directory"),
    ):
        assert init(command) == (status, f"superd: cannot run {command!r}: {reason}\n")
    status, text = init("nonexistent-program", options=("--log", "json"))
    assert (status, text[:9]) == (127, '{"time":"')


def test_no_process_can_be_had(require: Require, superd: Superd) -> None:  # H6
    """It says so, and not that all is well."""
    failing = "inject=clone,clone3,fork,vfork:error=EAGAIN"
    strace = (require("strace"), "-f", "-o", "/dev/null", "-e", "trace=clone,clone3,fork,vfork", "-e", failing)
    for options in ((), ("-c", str(superd.conf), "--control", "off")):
        status, text = init("/bin/true", options=options, wrapper=strace)
        assert status == 127
        assert text.endswith("superd: cannot run '/bin/true': fork: resource temporarily unavailable\n") or options
        assert "cannot run '/bin/true': fork: resource temporarily unavailable" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--"],
        ["--single-child"],
        ["--rewrite", "TERM:QUIT"],
        ["--strict", "--", "true"],
        ["--control", "off", "--", "true"],
        ["--drain-timeout", "10", "--", "true"],
        *(["--rewrite", word, "--", "true"] for word in
          ("", "TERM", "TERM:", ":TERM", "TERM:NONE", "TRM:INT", "0:1", "15:65", "15:32", "KILL:1", "19:1", "SEGV:1")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(arguments: list[str]) -> None:
    done = subprocess.run([*SUPERD, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match("superd: ", done.stderr)


def test_options_of_the_command_are_its_own() -> None:
    assert init("/bin/echo", "-c", "--", "--version") == (0, "-c -- --version\n")


# --- what the command is given


def test_everything_is_as_superd_found_it(tmp_path: Path) -> None:  # E7 E18 E20
    """Directory, umask, limits, environment, ids, dispositions, mask, fds: a shell's word without and with superd."""
    script = (
        "pwd; umask; ulimit -Sn; ulimit -Hn; ulimit -c; env | grep -v ^_= | sort; id; echo $0"
        "; grep -E '^(Sig|Shd)(Blk|Ign|Pnd)' /proc/self/status; cat <&7; cat /proc/self/oom_score_adj"
    )
    (tmp_path / "seven").write_text("seven\n")
    prepare = (
        "import os, resource, signal, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))\n"
        "for s in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGQUIT, signal.SIGHUP):\n"
        "    signal.signal(s, signal.SIG_DFL)\n"
        "for s in (signal.SIGTTOU, signal.SIGSEGV, signal.SIGINT, signal.SIGCHLD, 40):\n"
        "    signal.signal(s, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTTIN, signal.SIGILL, signal.SIGTERM, 50])\n"
        "os.umask(0o137); os.dup2(os.open('seven', os.O_RDONLY), 7)\n"
        "env = {'A': 'ä \\n=', 'PATH': os.defpath, 'NOTIFY_SOCKET': '/n', 'LISTEN_PID': '1', 'LISTEN_FDS': '2'}\n"
        "os.execve(sys.argv[1], sys.argv[1:], env)\n"
    )
    found = [
        subprocess.run(
            [PYTHON, "-I", "-c", prepare, *wrapper, *command],
            cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
        )
        for command in (["/bin/bash", "-c", script], ["/bin/sed", "-n", "/^Sig[BI]/p", "/proc/self/status"])
        for wrapper in ([], [*SUPERD, "--"])
    ]  # fmt: skip
    assert found[0].stdout.count(b"\n") > 15
    assert b"seven\n" in found[0].stdout
    blocked, ignored = (int(line.split()[1], 16) for line in found[2].stdout.splitlines())
    libcs_own = 0b11 << 31  # 32 and 33, which nobody else can change: they are as whoever runs the tests has them
    assert (blocked, ignored & ~libcs_own) == (0x0002000000104008, 0x0000008000210402)
    for without, with_superd in (found[:2], found[2:]):
        assert (with_superd.returncode, with_superd.stdout, with_superd.stderr) == (0, without.stdout, b"")


@pytest.mark.parametrize("services", [False, True])
def test_closed_standard_fds(superd: Superd, services: bool) -> None:  # E25
    """/dev/null instead, and nothing else comes to stand there."""
    found = superd.dir / "found"
    script = f"ls -l /proc/$$/fd /proc/$PPID/fd | cat >{found}"
    options = ["-c", str(superd.conf), "--control", "off"] if services else []
    closing = ["/bin/sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh"]
    assert (
        subprocess.run([*closing, *SUPERD, *options, "--", "/bin/sh", "-c", script], timeout=TIMEOUT_S).returncode == 0
    )
    text = found.read_text()
    for fd in (0, 1, 2):
        assert text.count(f" {fd} -> /dev/null\n") == 2


def test_superd_stays_out_of_its_directory() -> None:  # E18, (e)15
    script = "readlink /proc/$PPID/cwd; readlink /proc/$$/cwd; ls -l /proc/$PPID/fd"
    with tempfile.TemporaryDirectory() as room:
        status, text = init("/bin/sh", "-c", script, cwd=room)
        assert (status, text.splitlines()[:2]) == (0, ["/", os.path.realpath(room)])
        assert room not in text.partition("\n")[2].partition("\n")[2]


def test_superd_keeps_no_fd_of_the_command() -> None:  # E3
    """A pipe that superd was started with ends when the command closes it, which has the only copy."""
    reader, writer = os.pipe()
    with started(
        "/bin/bash", "-c", f"exec {writer}>&-; echo closed; read x", pass_fds=[writer], stdin=subprocess.PIPE
    ) as p:
        os.close(writer)
        assert line(p) == "closed"
        assert select.select([reader], [], [], TIMEOUT_S)[0]
        assert os.read(reader, 1) == b""
        assert p.stdin is not None
        p.stdin.close()
        assert p.wait(TIMEOUT_S) == 1
    os.close(reader)


def test_sockets_that_superd_was_given() -> None:  # (e)14
    """LISTEN_PID becomes the command's, if it was superd's."""
    reader, writer = os.pipe()
    hand_over = (
        f"import os, sys; os.dup2({reader}, 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    wrapper = (PYTHON, "-I", "-c", hand_over)
    os.write(writer, b"from fd 3\n")
    os.close(writer)
    environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "LISTEN_PIDFDID": "1"}
    script = 'test $LISTEN_PID = $$ && echo $LISTEN_FDS $LISTEN_FDNAMES; test "$LISTEN_PIDFDID" != 1 && cat <&3'
    found = init("/bin/sh", "-c", script, wrapper=wrapper, pass_fds=[reader], env=environment)
    os.close(reader)
    assert found == (0, "1 x\nfrom fd 3\n")


def test_nbdkit_takes_them(require: Require) -> None:  # (e)14
    """It checks LISTEN_PID, as catatonit's users found out."""
    nbdkit = require("nbdkit")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hand_over = (
            f"import os, sys; os.dup2({listener.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        argv = [PYTHON, "-I", "-c", hand_over, *SUPERD, "--", nbdkit, "-f", "memory", "1M"]
        environment = {**os.environ, "LISTEN_FDS": "1"}
        with subprocess.Popen(argv, env=environment, pass_fds=[listener.fileno()]) as process:
            with socket.create_connection(listener.getsockname(), timeout=TIMEOUT_S) as client:
                assert client.recv(16, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT"
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0


# --- signals


def forwarded() -> list[int]:
    return [signo for signo in CATCHABLE if signo != signal.SIGCHLD]


def test_signals_are_passed_on() -> None:  # H8, (e)5
    """Everything that can be caught, real-time signals too, but CHLD; the three that suspend are below."""
    wanted = sorted({*range(1, 65)} - {4, 5, 6, 7, 8, 11, 31, 9, 19, 17, 32, 33, 20, 21, 22})
    with started(PYTHON, "-I", "-c", PRINT_SIGNALS) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGCHLD)
        for signo in wanted:
            process.send_signal(signo)
            assert line(process) == str(signo)
        assert sorted([*wanted, 20, 21, 22]) == forwarded()


def test_real_time_signals_are_counted() -> None:
    with started(PYTHON, "-I", "-c", PRINT_SIGNALS) as process:
        assert line(process) == "ready"
        for _ in range(20):
            process.send_signal(signal.SIGRTMIN + 2)
        process.send_signal(signal.SIGRTMAX)
        found = sorted(int(line(process)) for _ in range(21))
        assert found == [signal.SIGRTMIN + 2] * 20 + [signal.SIGRTMAX]


@pytest.mark.parametrize("single", [False, True])
def test_rewrite(single: bool) -> None:
    rules = ("TERM:QUIT", "SIGINT:0", "28:0", "1:31", "SYS:1", "RTMIN+1:RTMAX-1")
    options = tuple(word for rule in rules for word in ("--rewrite", rule)) + ("--single-child",) * single
    with started(PYTHON, "-I", "-c", PRINT_SIGNALS, options=options) as process:
        assert line(process) == "ready"
        for sent, got in (("TERM", 3), ("INT", 0), ("WINCH", 0), ("HUP", 31), ("SYS", 1), ("USR1", 10)):
            process.send_signal(getattr(signal, f"SIG{sent}"))
            if got:
                assert line(process) == str(got)
        process.send_signal(signal.SIGRTMIN + 1)
        assert line(process) == str(signal.SIGRTMAX - 1)


@pytest.mark.parametrize("single", [False, True])
def test_group_or_child(single: bool) -> None:  # H7
    """TERM ends a shell's children with it, or the shell alone."""
    script = "trap 'exit 9' USR1; (trap '' TERM; trap 'echo child; exit' USR1; sleep 1000 & echo ready; wait) & wait"
    with started("/bin/bash", "-c", script, options=("--single-child",) * single) as process:
        assert line(process) == "ready"
        below = descendants(process.pid)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(TIMEOUT_S) == 9
        if single:  # dumb-init's and tini's way: what is left is left
            assert len([pid for pid in below if comm(pid)]) == 2
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            assert line(process) == "child"
            for pid in below:
                wait_gone(pid)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", ["TSTP", "TTIN", "TTOU"])
def test_suspend(single: bool, name: str) -> None:
    """superd stops itself too, so that a shell sees its job stop, and CONT lets both go on."""
    signo = getattr(signal, f"SIG{name}")
    with started(PYTHON, "-I", "-c", PRINT_SIGNALS, options=("--single-child",) * single) as process:
        assert line(process) == "ready"
        process.send_signal(signo)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        if single:
            assert line(process) == str(int(signo))
        process.send_signal(signal.SIGCONT)
        assert line(process) == str(int(signal.SIGCONT))


def test_a_fault_of_superd_is_not_the_commands() -> None:  # H8
    with started("/bin/sleep", "1000", preexec_fn=lambda: __import__("resource").setrlimit(4, (0, 0))) as process:
        below = wait_for_child(process.pid)
        process.send_signal(signal.SIGSEGV)
        assert process.wait(TIMEOUT_S) == -signal.SIGSEGV
        assert comm(below) == "sleep"
        os.kill(below, signal.SIGKILL)


def wait_for_child(pid: int) -> int:
    """The main command, when it has executed its program."""
    while True:
        for child in descendants(pid):
            if "python" not in comm(child) and not comm(child).startswith("superd"):
                return child
        select.select([], [], [], 0.01)  # nothing announces an exec


def test_the_command_is_anothers(require: Require, root: None) -> None:  # (e)12
    """It has changed its user, and superd has no CAP_KILL: it says so once and goes on."""
    capsh, setpriv = require("capsh"), require("setpriv")
    argv = [capsh, "--drop=cap_kill", "--", "-c", 'exec "$@"', "x", *SUPERD, "--",
            setpriv, "--reuid=64998", "--clear-groups", "sh", "-c", "echo ready; read x; exit 3"]  # fmt: skip
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as p:
        assert line(p) == "ready"
        for _ in range(3):
            p.send_signal(signal.SIGTERM)
            p.send_signal(signal.SIGHUP)
        _, errors = p.communicate(b"\n", TIMEOUT_S)
        assert (p.returncode, errors.count(b"CAP_KILL")) == (3, 1)


# --- the end


def test_what_the_command_leaves_gets_term() -> None:  # G5 G6 (e)6
    """One in its group, one that has left it, one that is stopped: all are told, all are waited for."""
    script = """
        (trap 'sleep 0.1; echo group; exit' TERM; echo ready; while :; do sleep 1; done) 3<&- &
        setsid sh -c "trap 'echo session; exit' TERM; echo ready; while :; do sleep 1; done" &
        sh -c "trap 'echo stopped; exit' TERM; echo ready; kill -STOP \\$\\$; while :; do sleep 1; done" &
        read x; read x; exit 5
    """
    reader, writer = os.pipe()
    with started("/bin/bash", "-c", script, stdin=reader) as process:
        assert [line(process) for _ in range(3)] == ["ready"] * 3
        below = descendants(process.pid)
        os.write(writer, b"\n\n")
        os.close(reader)
        os.close(writer)
        assert sorted(line(process) for _ in range(3)) == ["group", "session", "stopped"]
        assert process.wait(TIMEOUT_S) == 5
        for pid in below:
            assert comm(pid) == ""


def test_term_comes_once() -> None:
    """And nothing else: some programs take a second one for impatience."""
    code = PRINT_SIGNALS.replace("while True:", "for _ in range(2):")
    script = f"{shlex.join([PYTHON, '-I', '-c', code])} & read x; exit 0"
    with started("/bin/bash", "-c", script, stdin=subprocess.PIPE, options=("--drain-timeout", "500ms")) as process:
        assert line(process) == "ready"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0
        assert [line(process), line(process)] == ["15", ""]


def test_what_ignores_term_is_killed() -> None:  # G9
    script = "(trap '' TERM; echo ready; exec sleep 1000) & read x; exit 0"
    with started("/bin/bash", "-c", script, options=("--drain-timeout", "200ms"), stdin=subprocess.PIPE,
                 stderr=subprocess.PIPE) as process:  # fmt: skip
        assert line(process) == "ready"
        below = descendants(process.pid)
        _, errors = process.communicate(b"\n", TIMEOUT_S)
        assert process.returncode == 0
        assert errors == b"superd: what '/bin/bash' has left did not stop within 0.2 s; killing it\n"
        assert [comm(pid) for pid in below] == [""] * len(below)


def test_a_second_term_kills_at_once() -> None:
    script = "(trap 'echo told' TERM; echo ready; while :; do sleep 0.1; done) & read x; exit 6"
    with started("/bin/bash", "-c", script, options=("--drain-timeout", "1h"), stdin=subprocess.PIPE) as process:
        assert line(process) == "ready"
        assert process.stdin is not None
        process.stdin.close()
        assert line(process) == "told"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 6


@pytest.mark.parametrize("count", [100, 1000])
def test_orphans(count: int) -> None:  # G1 G2 G4 H4 (e)2 (e)13
    """Not as PID 1. None is left as a zombie, each was superd's: the test fails without a subreaper."""
    script = f"""
        for i in $(seq {count}); do (sleep 0 &); done
        while grep -ls "^PPid:.$PPID$" /proc/[0-9]*/status 2>/dev/null | grep -v "/$$/"; do :; done >/dev/null
        (sh -c 'echo $PPID; sleep 0.1; cut -d" " -f4 /proc/self/stat' &) | cat >/dev/null
    """
    assert init("/bin/bash", "-c", script) == (0, "")


def test_no_subreaper(require: Require) -> None:  # H4 (e)13
    """A kernel that refuses: superd says so and does the rest."""
    strace = (
        require("strace"),
        "-f",
        "-o",
        "/dev/null",
        "-e",
        "trace=prctl",
        "-e",
        "inject=prctl:error=EINVAL:when=1+",
    )
    status, text = init("/bin/sh", "-c", "exit 4", wrapper=strace)
    assert status == 4
    assert "superd: cannot become a subreaper; orphans will go to init" in text


# --- the terminal


class Terminal:
    """A pty with a program on it, and what it has written since it was last asked."""

    def __init__(self, *argv: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="dumb", PS1="$ ", HISTFILE="/dev/null")
            os.execv(argv[0], argv)
        self.text = b""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, wanted: str) -> None:
        while wanted.encode() not in self.text:
            assert select.select([self.fd], [], [], TIMEOUT_S)[0], f"no {wanted!r} in {self.text!r}"
            try:
                part = os.read(self.fd, 4096)
            except OSError:  # EIO: the last one has gone
                part = b""
            assert part, f"no {wanted!r} in {self.text!r}"
            self.text += part
        self.text = self.text.partition(wanted.encode())[2]

    def wait(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self.fd, 4096):
                pass
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        if self.pid:
            for pid in [*descendants(self.pid), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait()
        os.close(self.fd)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    found: list[Terminal] = []

    def start(*argv: str) -> Terminal:
        found.append(Terminal(*argv))
        return found[-1]

    yield start
    for one in found:
        one.close()


def test_job_control(terminal: Callable[..., Terminal]) -> None:  # H3 (e)7
    """superd leads the session, as in a container with a terminal: bash below it has all of job control."""
    tty = terminal(*SUPERD, "--", "/bin/bash", "--norc", "--noediting", "-i")
    tty.type("echo flags=[$-]\n")
    tty.until("flags=[")
    tty.until("]")  # of the echo
    tty.type("case $- in *m*) echo has-''m;; esac; while :; do echo loop''ing; done\n")
    tty.until("has-m")
    tty.until("looping")
    tty.type("\x03")
    tty.type("echo status''=$?\n")
    tty.until("status=130")
    tty.type("sh -c 'echo be''gun; exec cat'\n")
    tty.until("gun\r\n")  # what was typed is not on a line of its own
    tty.type("\x1a")
    tty.until("Stopped")
    tty.type("kill %1; wait; stty size; trap 'echo win''ch' WINCH\n")
    fcntl.ioctl(tty.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 44, 0, 0))
    tty.type("stty size\n")
    tty.until("33 44")
    tty.type("exit 5\n")
    assert tty.wait() == 5


def test_the_terminals_signals(terminal: Callable[..., Terminal]) -> None:  # H7 (e)7
    """Each once, not once more from superd. Where nobody could continue it ^Z is no trap."""
    code = (
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [2, 3]); print('begun', flush=True)\n"
        "for _ in range(3): print('signal', int(signal.sigwait([2, 3])), flush=True)\n"
        "for line in sys.stdin: print('got', line, end='', flush=True)\n"
        "sys.exit(7 + len(signal.sigpending()))"
    )
    tty = terminal(*SUPERD, "--", PYTHON, "-I", "-c", code)
    tty.until("begun")
    for typed, said in (("\x03", 2), ("\x1c", 3), ("\x03", 2)):
        tty.type(typed)
        tty.until(f"signal {said}\r\n")
    tty.type("\x1a")
    tty.type("a\n")
    tty.until("got a\r\n")
    tty.type("\x04")
    assert tty.wait() == 7


def test_a_job_of_a_shell(terminal: Callable[..., Terminal]) -> None:  # H3
    """^Z, fg, a read from the background, fg, ^C: as for any other program."""
    tty = terminal("/bin/bash", "--norc", "--noediting", "-i")
    tty.type("PS1=; set +o history\n")
    job = shlex.join([*SUPERD, "--", "/bin/sh", "-c", "echo be''gun; exec cat"])
    tty.type(f"{job}; echo status''=$?\n")
    tty.until("begun\r\n")
    tty.type("a\n")
    tty.until("a\r\na\r\n")
    tty.type("\x1a")
    tty.until("Stopped")
    tty.type("fg; echo status''=$?\n")
    tty.until("exec cat")  # fg shows it
    tty.type("b\n")
    tty.until("b\r\n")
    tty.until("b\r\n")
    tty.type("\x04")
    tty.until("status=0")
    tty.type(f"{job} &\n")
    tty.until("begun\r\n")
    tty.type("until jobs | grep Sto''pped; do sleep 0.1; done; fg; echo status''=$?\n")
    tty.until("Stopped")
    tty.until("exec cat")
    tty.type("c\n")
    tty.until("c\r\n")
    tty.until("c\r\n")
    tty.type("\x03")
    tty.until("status=130")
    tty.type("exit 3\n")
    assert tty.wait() == 3


def test_no_foreground_is_stolen(terminal: Callable[..., Terminal]) -> None:
    """A superd in the background leaves the terminal to who has it, and passes it on only when it is given it."""
    tty = terminal("/bin/bash", "--norc", "--noediting", "-i")
    tty.type(f"PS1=; {shlex.join([*SUPERD, '--', '/bin/sleep', '1000'])} &\n")
    tty.type("echo wi''th; cat\n")
    tty.until("with")
    tty.type("mine\n")
    tty.until("mine\r\nmine")
    tty.type("\x04kill %1; wait %1; echo status''=$?\n")
    tty.until("status=143")
    tty.type("exit\n")
    tty.wait()


def test_hang_up(terminal: Callable[..., Terminal]) -> None:  # H2
    """The fresh command sees no HUP of superd's making; it does when the terminal goes."""
    tty = terminal(*SUPERD, "--", "/bin/sh", "-c", "trap 'exit 4' HUP; echo begun; while :; do sleep 0.1; done")
    tty.until("begun")
    os.kill(tty.pid, signal.SIGHUP)
    assert tty.wait() == 4
