"""Entry of the manager role: take what the keeper has, read the configuration or adopt the one in force, run."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from typing import TYPE_CHECKING

import trio

from superd.core.problems import Problem, format_problems
from superd.core.spec import Snapshot
from superd.manager.configuration import Configuration
from superd.manager.control import ControlServer, control_address
from superd.manager.keeperlink import Inheritance, KeeperLink
from superd.manager.logs import Log, Sink, wants_colour
from superd.manager.reload import Reloader
from superd.manager.supervisor import Supervisor
from superd.system import configdir, process

if TYPE_CHECKING:
    from superd.keeper import Options

EX_CONFIG = 78
_LAST_RECORDS_S = 1.0


def main(channel: socket.socket, options: Options, nofile: tuple[int, int]) -> int:
    """In the child that the keeper forked. The keeper exits when it is told to; this status is for its eyes."""
    gc.disable()  # until there is a loop: thousands of services would be looked through again and again (Reloader.run)
    process.set_name("superd-manager")
    process.give_memory_back()
    with contextlib.suppress(OSError):
        os.setsid()  # ^C on superd's terminal is the keeper's to hear
    for signo in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signo, signal.SIG_IGN)  # errors of the write, not the end of the manager
    for signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signo, signal.SIG_IGN)  # meant for the keeper, which passes them on as messages
    keeper = KeeperLink(channel)
    inheritance = keeper.receive_inheritance()
    configuration, problems = _load(inheritance, options)
    snapshot = configuration.snapshot
    log = _make_log(snapshot, options)
    if not inheritance.up:
        _report(problems, log, options.log or snapshot.daemon.log)
        if options.strict and any(problem.is_error for problem in problems):
            log.message("cannot start: the configuration has errors, and --strict was given", level="err")
            log.flush()
            keeper.finish("exit", status=EX_CONFIG)
            return EX_CONFIG
        assumed = [spec.name for spec in snapshot.services.values() if spec.user_assumed and spec.enabled]
        if assumed and options.trial is not None:
            log.message(
                "superd is root, so it runs this as the user nobody; --user root, or any other, says who it is",
                level="notice", service=assumed[0],
            )  # fmt: skip
        elif assumed:
            log.message(
                f"no `user` in the file, so superd runs it as the user nobody: {', '.join(assumed)}", level="notice"
            )
    supervisor = Supervisor(
        snapshot, keeper, log, inheritance, nofile_soft=nofile[0], runtime_directory=_runtime_directory(inheritance)
    )
    supervisor.sources = configuration.sources
    supervisor.strict = options.strict
    supervisor.trial = options.trial
    supervisor.drain_s = options.drain_s
    supervisor.log_option = options.log
    supervisor.form = options.log or snapshot.daemon.log
    supervisor.reloader = Reloader(supervisor, configuration, watch=options.watch)
    supervisor.reloader.remember(map(str, problems))
    if not inheritance.up:
        supervisor.reloader.store()
    supervisor.control = ControlServer(
        supervisor, control_address(options.control, snapshot.daemon.control, os.environ)
    )
    status: int = trio.run(supervisor.run)
    log.flush()
    log.sink.finish(_LAST_RECORDS_S)
    _remove_private(supervisor.runtime_directory)
    keeper.finish("exit", status=status)
    return status


def _load(inheritance: Inheritance, options: Options) -> tuple[Configuration, list[Problem]]:
    """The configuration as it is on disk, or as it is in force: a manager that follows another must not pick up a
    change that nobody has asked for, of the files or of the machine."""
    if options.trial is not None:
        configuration = Configuration((), os.environ, is_root=os.geteuid() == 0, given=options.trial.source)
    else:
        paths = options.config or configdir.default_config_paths(os.environ, os.geteuid())
        configuration = Configuration(paths, os.environ, is_root=os.geteuid() == 0)
    for fd in inheritance.held.pop("sources", ()):
        with open(fd, "rb") as file, contextlib.suppress(ValueError):  # of another version: the files are all there is
            configuration.restore(os.pread(file.fileno(), os.fstat(fd).st_size, 0))
            return configuration, []
    return configuration, configuration.read_first()


def _make_log(snapshot: Snapshot, options: Options) -> Log:
    form = options.log or snapshot.daemon.log
    return Log(Sink(2), form, snapshot.daemon.log_level, colour=wants_colour(2, os.environ))


def _report(problems: list[Problem], log: Log, form: str) -> None:
    """For people in the caret form, before there is a loop that could be held up; for programs one record each."""
    if form != "text":
        for problem in problems:
            where = f"{problem.path}:{problem.line}" if problem.line else problem.path
            level = "err" if problem.is_error else "warning"
            text = format_problems([problem], "short").strip()
            log.record("message", text, level=level, service=problem.service, file=where)
    elif problems:
        with contextlib.suppress(OSError):
            os.write(2, format_problems(problems, "full").encode(errors="replace"))


def _runtime_directory(inheritance: Inheritance) -> str:
    """Where superd's own sockets stand. The first that can be had; a private one below /tmp at last (D14)."""
    own = os.environ.get("XDG_RUNTIME_DIR")
    candidates = ["/run/superd"] if os.geteuid() == 0 else [f"{own}/superd"] if own else []
    for path in (*candidates, _private_directory()):
        try:
            os.makedirs(path, mode=0o755, exist_ok=True)
            found = os.lstat(path)
        except OSError:
            continue
        if found.st_uid == os.geteuid() and not found.st_mode & 0o022 and os.access(path, os.W_OK):
            return path
    return "/run/superd"


def _private_directory() -> str:
    """A name of its own for each superd."""
    return f"/tmp/superd-{os.geteuid()}-{os.getppid()}"


def _remove_private(directory: str) -> None:
    if directory == _private_directory():
        for path in (os.path.join(directory, "notify"), directory):
            with contextlib.suppress(OSError):
                os.rmdir(path)
