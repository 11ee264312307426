"""The notify socket of one service, sd_notify(3): whose messages count, in which order, and what each field does."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from superd.core.lifecycle import Event, History, State
from superd.core.plan import Program
from superd.core.problems import printable
from superd.manager import environment
from superd.manager.fdstore import DEFAULT_NAME, FdStore
from superd.manager.mainprocess import MainProcess
from superd.manager.watch import READ
from superd.manager.watchdog import Watchdog
from superd.system import notify, tree

if TYPE_CHECKING:
    from superd.manager.process import ProcessService

# A flooder must not starve the others: it gets a share of the time, 6,400 messages a second (I11).
_MESSAGES_PER_TURN, _TURN_S = 64, 0.01
_LAST_MESSAGES = 4096  # of a process that has ended; the socket's queue holds fewer (net.unix.max_dgram_qlen)
_ERROR_REST_S = 0.1  # after an error of recvmsg(2)
_TEXT_BYTES = 1024
_PID_MAX = 1 << 22  # proc_sys_kernel(5), pid_max
_ERRORS = ("ERRNO", "BUSERROR", "VARLINKERROR")


class Notifications:
    """What a service says. While its process is on its way nothing is read: nobody knows yet whose messages count."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self.socket: socket.socket | None = None
        self.store = FdStore(service)
        self.watchdog = Watchdog(service)
        self.access: str | None = None  # NOTIFYACCESS= of this process
        self.ignored = 0  # messages that did not count
        self.problems: dict[str, str] = {}  # ERRNO= and its kin, of this process
        self._known: dict[int, bool] = {}  # senders judged in this turn
        self._held = False  # nothing is read
        self._resting = False  # nothing is read but by `drain`

    @property
    def address(self) -> str | None:
        """For NOTIFY_SOCKET; None: there is none."""
        return None if self.socket is None else notify.address_of(self.socket)

    # -- the socket

    def open(self) -> None:
        """Adopt the socket of an earlier manager, or bind one. What fails is said, and the service goes without."""
        service, supervisor = self.service, self.service.supervisor
        if self.socket is not None or not service.spec.notifies:
            return
        held = supervisor.inheritance.held.pop(f"notify:{service.name}", None)
        try:
            if held:
                self.socket = socket.socket(fileno=held[0])
            else:
                uid = environment.trusted_uid(service.spec)
                self.socket = notify.open_socket(supervisor.runtime_directory, service.name, uid, os.getppid())
                supervisor.keeper.send("store", [self.socket.fileno()], name=f"notify:{service.name}")
        except OSError as error:
            service.error(f"cannot open its notify socket: {error}")
            return
        supervisor.watch.add(self.socket.fileno(), lambda _: self.read())

    def _watch(self) -> None:
        if self.socket is not None:
            self.service.supervisor.watch.change(self.socket.fileno(), 0 if self._held or self._resting else READ)

    def _hold(self, held: bool) -> None:
        if held is not self._held:
            self._held = held
            self._watch()

    def _rest(self, delay_s: float) -> None:
        if not self._resting:
            self._resting = True
            self._watch()
            self.service.supervisor.timers.after(delay_s, self._rested)

    def _rested(self) -> None:
        self._resting = False
        self._watch()

    def read(self) -> None:
        """One turn's share of what has come, in order."""
        if not self._read(_MESSAGES_PER_TURN):
            self._rest(_TURN_S)

    def drain(self) -> None:
        """All that has come: before an exit or a missing ping is judged (I13, X30)."""
        self._read(_LAST_MESSAGES)

    def _read(self, most: int) -> bool:
        """Whether nothing is left."""
        self._known.clear()
        for _ in range(most):
            if self.socket is None or self._held:
                return True
            try:
                message = notify.receive(self.socket)
            except OSError as error:
                self.service.error(f"cannot read its notify socket: {error.strerror}; trying again", level="warning")
                self._rest(_ERROR_REST_S)
                return True
            if message is None:
                return True
            try:
                why = self._objection(message)
                if why is None:
                    self._handle(message)
                else:
                    self.ignored += 1
                    self.service.error(f"ignored a notify message: {why}", level="warning")
            finally:
                message.close()  # this answers a BARRIER=1
        return False

    def close(self) -> None:
        self.watchdog.stop()
        self.store.clear()
        if self.socket is not None:
            self.service.supervisor.watch.remove(self.socket.fileno())
            self.service.supervisor.keeper.send("drop", name=f"notify:{self.service.name}")
            notify.close_socket(self.socket)
            self.socket = None

    # -- the life of a process

    def equip(self, program: Program, *, beside: bool) -> Program:
        """What the next process is given. What the last one's helpers still say is not its word, unless that goes on
        beside it."""
        self.open()
        self.drain()
        if not beside:
            self.forget_process()
        variables = {}
        if self.address is not None:
            variables["NOTIFY_SOCKET"] = self.address
            self._hold(True)
        spec = self.service.spec
        if spec.fdstore:
            variables["FDSTORE"] = str(spec.fdstore)
        usec = None if spec.watchdog_s is None else max(int(spec.watchdog_s * 1_000_000), 1)
        return replace(program, environment={**program.environment, **variables}, watchdog_usec=usec)

    def forget_process(self) -> None:
        """What is said from now on is another one's word."""
        self.watchdog.reset()
        self.access = None
        self.problems = {}
        self.service.status_text = ""

    def resume(self) -> None:
        """Its pid is known, or there will be none."""
        self._hold(False)

    def ended(self) -> None:
        self.watchdog.stop()

    # -- whose messages count

    def _objection(self, message: notify.Message) -> str | None:
        """Why it does not count; None: it does."""
        service, fields = self.service, message.fields
        if not fields:
            return f"no VARIABLE=VALUE in it (pid {message.pid})"
        if fields.get("BARRIER") == "1":
            if len(fields) > 1 or len(message.fds) != 1:
                return "BARRIER=1 comes alone, with one fd"
            return None
        if service.instance is None:
            return f"pid {message.pid} is a process of an earlier start"
        access = self.access or service.spec.notify_access
        if access == "none":
            return 'notify_access is "none"'
        if message.pid == service.instance.pid or message.pid in service.overlap.mains():
            return None
        if access != "all":
            main = service.instance.pid
            return f'pid {message.pid} is not the main process ({main}), and notify_access is "{access}"'
        if message.pid not in self._known:
            self._known[message.pid] = self._is_ours(message.pid)
        return None if self._known[message.pid] else f"pid {message.pid} is no process of the service"

    @staticmethod
    def _leader(pid: int, leaders: list[int]) -> int:
        """Which of these processes it is, or is in the session of; 0: of none."""
        if pid in leaders:
            return pid
        row = tree.look(pid)
        return row.session if row is not None and row.session in leaders else 0

    def _is_ours(self, pid: int) -> bool:
        # One that has ended since was of the service too: nobody else can write to this socket (I3, I14).
        return self._owner(pid) == self.service.name or not os.path.exists(f"/proc/{pid}/exe")

    def _owner(self, pid: int) -> str | None:
        """The service that a process belongs to, "" for one below superd that none claims; None: it is a stranger."""
        processes = self.service.supervisor.processes
        processes.forget()
        found = (name for name, rows in processes.by_service().items() for row in rows if row.pid == pid)
        return next(found, None)

    # -- what they do

    def _handle(self, message: notify.Message) -> None:
        fields = message.fields
        if "BARRIER" in fields:
            return
        overlap = self.service.overlap
        if overlap.busy() and (beside := self._leader(message.pid, overlap.mains())):
            successor = overlap.successor
            if successor is not None and successor.instance.pid == beside:
                successor.said(message)
            if {"FDSTORE", "FDSTOREREMOVE"} & fields.keys():
                self._store(message)
            return
        for names, act in self._FIELDS:
            if any(name in fields for name in names):
                act(self, message)

    def _turn(self, message: notify.Message) -> None:
        """STOPPING wins over READY, READY over RELOADING."""
        service, fields = self.service, message.fields
        ready, reloading = fields.get("READY") == "1", fields.get("RELOADING") == "1"
        if fields.get("STOPPING") == "1":
            if service.can_change:
                service.log.message("stops by itself (STOPPING=1)", service=service.name)
                self.watchdog.stop()
                service.dispatch(Event.LEAVING)
            return
        if reloading and service.state is State.READY:
            said = notify.number(fields.get("MONOTONIC_USEC"))
            if said is None or said >= service.reload_sent_usec:
                service.reload_begins()
            elif not ready:
                self.ignored += 1  # it is older than what it was asked for
        if ready:
            if service.reloading:
                service.reload_ends()
            elif service.state is State.STARTING and service.spec.ready.kind == "notify":
                service.said_ready()

    def _status(self, message: notify.Message) -> None:
        text = printable(message.fields["STATUS"].encode()[:_TEXT_BYTES].decode(errors="ignore"))
        if text != self.service.status_text:
            self.service.status_text = text
            self.service.supervisor.snapshot_wanted = True

    def _problem(self, message: notify.Message) -> None:
        for name in _ERRORS:
            if name in message.fields:
                text = printable(message.fields[name][:256])
                code = notify.number(text) if name == "ERRNO" else None
                self.problems[name] = text
                reason = f": {os.strerror(code).lower()}" if code is not None and 0 < code < 4096 else ""
                self.service.error(f"says {name}={text}{reason}", level="warning")

    def _access(self, message: notify.Message) -> None:
        wanted = message.fields["NOTIFYACCESS"]
        if wanted in ("none", "main", "exec", "all"):
            self.access = "main" if wanted == "exec" else wanted
            self.service.supervisor.snapshot_wanted = True
        else:
            self._refuse("NOTIFYACCESS", wanted, "none, main or all")

    def _main_pid(self, message: notify.Message) -> None:
        """MAINPID=, or MAINPIDFD=1 with a pidfd of it. MAINPIDFDID= tells whether the pid is still the one meant."""
        service, fields = self.service, message.fields
        if "MAINPID" not in fields and fields.get("MAINPIDFD") != "1":
            return
        if service.instance is None or not service.can_change:
            return
        if "MAINPID" in fields:
            said, pid = fields["MAINPID"], notify.number(fields["MAINPID"])
            if service.spec.context.private_pids:
                rows = service.supervisor.processes.look_again(service)
                pid = next((row.pid for row in rows if tree.inner_pid(row.pid) == pid), None)
        else:
            said, pid = "of a pidfd", notify.pid_of(message.fds[0]) if len(message.fds) == 1 else None
        if pid == service.instance.pid:
            return
        row = tree.look(pid) if pid is not None and 1 < pid <= _PID_MAX else None
        if row is None or row.zombie:
            return self._refuse("MAINPID", said, "there is no such process")
        # Root may name one that has left everything by which superd tells whose it is, but not a stranger (I6).
        owner = self._owner(row.pid)
        if owner != service.name and not (owner == "" and message.uid == 0):
            return self._refuse("MAINPID", said, "it is no process of the service")
        try:
            pidfd = MainProcess.find(row.pid, row.started)
        except OSError as error:  # a thread, or no fd is free
            return self._refuse("MAINPID", said, (error.strerror or "").lower())
        if pidfd is None:
            return self._refuse("MAINPID", said, "it has ended")
        identity = notify.number(fields.get("MAINPIDFDID"))
        if identity is not None and identity != os.fstat(pidfd).st_ino:
            os.close(pidfd)
            return self._refuse("MAINPID", said, "it has ended, and another has its pid")
        service.change_main(row.pid, pidfd, row.started)

    def _watchdog_usec(self, message: notify.Message) -> None:
        usec = notify.number(message.fields["WATCHDOG_USEC"])
        if usec is None:
            return self._refuse("WATCHDOG_USEC", message.fields["WATCHDOG_USEC"], "not a number of microseconds")
        self.watchdog.change(usec)
        self.service.supervisor.snapshot_wanted = True

    def _watchdog(self, message: notify.Message) -> None:
        if self.service.can_change:
            if message.fields["WATCHDOG"] == "1":
                self.watchdog.ping()
            elif message.fields["WATCHDOG"] == "trigger":
                self.service.bite("it says WATCHDOG=trigger")

    def _extend(self, message: notify.Message) -> None:
        usec = notify.number(message.fields["EXTEND_TIMEOUT_USEC"])
        if usec is None:
            return self._refuse("EXTEND_TIMEOUT_USEC", message.fields["EXTEND_TIMEOUT_USEC"],
                                "not a number of microseconds")  # fmt: skip
        self.service.extended_until = max(self.service.extended_until, time.monotonic() + usec / 1_000_000)
        self.service.supervisor.snapshot_wanted = True

    def _restart_reset(self, message: notify.Message) -> None:
        if message.fields["RESTART_RESET"] == "1":
            self.service.history = History()
            self.service.supervisor.snapshot_wanted = True

    def _store(self, message: notify.Message) -> None:
        fields, name = message.fields, message.fields.get("FDNAME", "")
        if fields.get("FDSTOREREMOVE") == "1":
            if notify.is_fd_name(name):
                self.store.remove(name)
        elif fields.get("FDSTORE") == "1" and self.service.spec.fdstore:
            name = name if notify.is_fd_name(name) else DEFAULT_NAME
            self.store.add(message.fds, name, polled=fields.get("FDPOLL") != "0")

    def _refuse(self, field: str, value: str, why: str) -> None:
        self.ignored += 1
        self.service.error(f"ignored {field}={printable(value[:40])}: {why}", level="warning")

    # In this order: a message may name the process that its other fields are about, store what is to outlive the state
    # that it ends, and ask for more time in the state that it begins.
    _FIELDS: tuple[tuple[tuple[str, ...], Callable[[Notifications, notify.Message], None]], ...] = (
        (("MAINPID", "MAINPIDFD"), _main_pid),
        (("STATUS",), _status),
        (_ERRORS, _problem),
        (("NOTIFYACCESS",), _access),
        (("WATCHDOG_USEC",), _watchdog_usec),
        (("RESTART_RESET",), _restart_reset),
        (("FDSTORE", "FDSTOREREMOVE"), _store),
        (("WATCHDOG",), _watchdog),
        (("READY", "RELOADING", "STOPPING"), _turn),
        (("EXTEND_TIMEOUT_USEC",), _extend),
    )

    # -- from one manager to the next

    def to_json(self) -> dict[str, Any]:
        service = self.service
        return {
            "status": service.status_text, "access": self.access, "watchdog": self.watchdog.said_s,
            "ignored": self.ignored, "reloading": service.reloading,
        }  # fmt: skip

    def take_over(self, was: dict[str, Any]) -> None:
        """Of a process that goes on; a full period of its watchdog begins."""
        service = self.service
        if was:
            service.status_text, self.access = was.get("status", ""), was.get("access")
            self.ignored, self.watchdog.said_s = was.get("ignored", 0), was.get("watchdog")
            if was.get("reloading") and service.state is State.READY:
                service.reload_begins()
        if service.state is State.READY:
            self.watchdog.ping()
