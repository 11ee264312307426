"""TLS in front of a service: a client's encrypted connection in, a plain one for the service out.

A client is held by the gate until its handshake is done, one step for each time that its socket is ready, and takes no
place meanwhile. Then the service gets one end of a socket pair, and a task carries bytes between the other end and the
client. Carried connections end with the manager.

Only a service that has a `tls` table causes this module to be loaded.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import ssl
import sys
import time
from typing import TYPE_CHECKING, Any

import trio

from superd.core.spec import Tls
from superd.manager.activation import local_of, peer_text
from superd.manager.proxy import carry
from superd.manager.watch import READ, WRITE, Timer
from superd.system import configdir, peers

if TYPE_CHECKING:
    from superd.manager.activation import ConnectionService
    from superd.manager.gate import Gate, Held

_CHUNK_BYTES = 1 << 16
_LOOK_S = 1.0
_STUCK_S = 60.0
_PER_TURN = 16  # handshakes that are begun, of one service: each costs 0.3 ms of CPU with a P-256 key
_SUBJECT_BYTES = 1500  # what an order to a spawner has room for, written as JSON
_HANDSHAKE = b"\x16"  # the first byte of every client that speaks TLS; RFC 8446, 5.1
_HTTP = re.compile(rb"[A-Z]{3,7} ")
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}", re.A)
# X.520's names as people write them (RFC 4514); others stand as OpenSSL calls them.
_SHORT = {
    "commonName": "CN", "countryName": "C", "localityName": "L", "stateOrProvinceName": "ST", "streetAddress": "STREET",
    "organizationName": "O", "organizationalUnitName": "OU", "domainComponent": "DC", "userId": "UID",
}  # fmt: skip


class _NoTlsError(OSError):
    """What a client says is something else, or nothing more."""


class Front:
    """The certificates of one gate, and its clients whose handshake is not done."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        service = gate.service
        self._left = _PER_TURN
        self._all = {tls: Certificates(service, tls) for tls in {s.tls for s in service.spec.sockets} if tls}

        def look() -> None:
            if service.gate is gate and service.wish_up:
                for certificates in self._all.values():
                    certificates.context()

        service.supervisor.later(look)

    def follow(self, was: Front) -> None:
        """Certificates that are in use go on, also where their files could not be read now."""
        self._all |= {tls: found for tls, found in was._all.items() if tls in self._all}

    def take(self, held: Held) -> None:
        """A client that has been let in, and may have begun its handshake before a reload."""
        supervisor, tls = self.gate.service.supervisor, held.listener.spec.tls
        session = held.session
        if session is None:
            assert tls is not None
            limit_s, why = tls.handshake_timeout_s, "tls: no handshake within handshake_timeout"
            held.until = time.monotonic() + limit_s
            if self.gate.first_byte_s is not None and self.gate.first_byte_s < limit_s:
                limit_s, why = self.gate.first_byte_s, "nothing came within first_byte_timeout"
            self._limit(held, limit_s, f"{why} = {limit_s:g} s")
        else:
            self._limit(held, held.until - time.monotonic(), "tls: no handshake within handshake_timeout")
        events = READ if session is None else session.waits_for
        supervisor.watch.add(held.fd, functools.partial(self._ready, held), events)

    def _limit(self, held: Held, limit_s: float, why: str) -> None:
        def too_late() -> None:
            self.gate.stop_waiting(held)
            self.gate.refuse(held, why)

        held.timer = self.gate.service.supervisor.timers.after(max(0.0, limit_s), too_late)

    def _ready(self, held: Held, _: int) -> None:
        if held.session is None and not self._may_begin():
            return  # it stays ready
        try:
            events = self._step(held)
        except (OSError, MemoryError) as error:
            self.gate.stop_waiting(held)
            return self.gate.refuse(held, f"tls: {explain(error)}")
        if not events:
            self.gate.stop_waiting(held)
            self.gate.let_pass(held)
        elif held.session is not None and events != held.session.waits_for:
            held.session.waits_for = events
            self.gate.service.supervisor.watch.change(held.fd, events)

    def _may_begin(self) -> bool:
        if self._left == _PER_TURN:
            self.gate.service.supervisor.later(self._next_turn)
        self._left -= 1
        return self._left >= 0

    def _next_turn(self) -> None:
        self._left = _PER_TURN

    def _step(self, held: Held) -> int:
        if held.session is None:  # it has said something: what is silent costs nothing but its place in the gate
            tls = held.listener.spec.tls
            certificates = None if tls is None else self._all.get(tls)
            context = None if certificates is None else certificates.context()
            if context is None:
                raise _NoTlsError("no certificate that could be used")
            if held.timer is not None:
                held.timer.cancel()  # that of its first byte
            self._limit(held, held.until - time.monotonic(), "tls: no handshake within handshake_timeout")
            os.set_blocking(held.fd, False)  # the service never has it
            held.session = Session(context)
        return held.session.shake_hands(held.fd)


class Certificates:
    """What one `tls` table names, as it was when it could be read last."""

    def __init__(self, service: ConnectionService, tls: Tls) -> None:
        self.service, self.tls = service, tls
        self._context: ssl.SSLContext | None = None
        self._signature: object = None
        self._looked = -_LOOK_S
        self._note = ""

    def context(self) -> ssl.SSLContext | None:
        """What the next connection gets; looks at the files, once a second at most. None: there is nothing yet."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            signature = tuple(map(_signature, self.tls.files))
            if signature != self._signature:
                self._signature = signature
                self._read()
        return self._context

    def _read(self) -> None:
        service, first = self.service, self._context is None
        try:
            self._context = make_context(self.tls)
        except (OSError, ValueError, MemoryError) as error:
            why = f"cannot use the certificate {self.tls.certificate}: {explain(error)}"
            before, self._note = self._note, f"tls: {why}"
            self._signature = None  # the reason may be one that no file shows: another mode above it, no fd
            if self._note != before:
                service.error(f"{self._note}; " + ("clients are refused" if first else "the old one goes on"))
            if service.note in ("", before):  # also when a reload has removed it
                service.note = self._note
                service.announce()
            return
        if self._note and service.note == self._note:
            service.note = ""
            service.announce()
        if not first or self._note:
            service.log.record("message", f"certificate {self.tls.certificate} read anew", service=service.name)
        self._note = ""


def _signature(path: str) -> object:
    try:
        facts = os.stat(path)
    except OSError as error:
        return error.errno
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def make_context(tls: Tls) -> ssl.SSLContext:
    """Raises OSError, ssl.SSLError and ValueError among them, when the files cannot be used."""
    trust = configdir.Trust(frozenset({0})) if os.geteuid() == 0 else None
    for path in tls.files:
        if why := configdir.unreadable(path) or (trust and trust.file(path)):
            raise ValueError(why)
    for path in (tls.key, *(one.key for one in tls.sni)):
        if trust and (why := configdir.exposed(path)):
            raise ValueError(why)
    named = {one.name: _make_context(tls, one.certificate, one.key) for one in tls.sni}
    context = _make_context(tls, tls.certificate, tls.key)
    context.sslobject_class = _Object

    def take_name(found: _Object, name: str | None, _: ssl.SSLContext) -> None:
        found.server_name = name
        wanted = (name or "").lower()
        other = named.get(wanted) or named.get(f"*.{wanted.partition('.')[2]}")
        if other is not None:
            found.context = other

    context.sni_callback = take_name  # type: ignore[assignment]  # typeshed has it with SSLSocket alone
    return context


def _make_context(tls: Tls, certificate: str, key: str) -> ssl.SSLContext:
    """With all the rest too: OpenSSL asks the one that a name leads to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE

    def no_passphrase() -> str:
        raise ValueError(f"{key} has a passphrase")  # OpenSSL would ask for it at the terminal

    context.load_cert_chain(certificate, key, no_passphrase)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL if tls.client_certificate == "optional" else ssl.CERT_REQUIRED
    if tls.alpn:
        context.set_alpn_protocols(list(tls.alpn))
    return context


class _Object(ssl.SSLObject):
    server_name: str | None = None


def explain(error: BaseException) -> str:
    """In words; of a few kinds, whatever a client does."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        if "PEM lib" in str(error):
            return "it does not hold a certificate and its key in PEM"
        return (error.reason or "protocol error").lower().replace("_", " ")
    if isinstance(error, _NoTlsError):
        return str(error)
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error) or "out of memory"


class Session:
    """TLS with one client: first steps of its handshake, then, once `begin` has been called, its bytes.

    OpenSSL reads and writes memory here, so that one direction never waits for the other.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.waits_for = READ
        self._begun = False
        self._unsent = memoryview(b"")

    # -- the handshake

    def shake_hands(self, fd: int) -> int:
        """As far as it goes now. The events that it waits for; 0: it is done. Raises OSError, ssl.SSLError too."""
        while True:
            done = self._do_handshake(fd)
            if not self._flush_now(fd):
                return WRITE
            if done:
                return 0
            try:
                data = os.read(fd, _CHUNK_BYTES)
            except BlockingIOError:
                return READ
            if not data:
                raise _NoTlsError("the client ended its handshake")
            if not self._begun and data[:1] != _HANDSHAKE:
                raise _NoTlsError("not TLS: the client speaks plain HTTP" if _HTTP.match(data) else "not TLS")
            self._begun = True
            self._incoming.write(data)

    def _do_handshake(self, fd: int) -> bool:
        # A server name that is not ASCII fails before take_name is called, and the ssl module prints a traceback.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            try:
                self._flush_now(fd)  # the alert that tells the client
            except OSError:
                pass  # it has gone
            raise
        finally:
            sys.unraisablehook = hook
        return True

    def _flush_now(self, fd: int) -> bool:
        """Send what there is; False: some is left."""
        while data := self._unsent or memoryview(self._outgoing.read()):
            self._unsent = data
            try:
                self._unsent = data[os.write(fd, data) :]
            except BlockingIOError:
                return False
        return True

    # -- facts

    def variables(self) -> dict[str, str]:
        """For the environment; only what there is (s6-tlsd has the same, but for ALPN)."""
        tls = self._tls
        cipher, name = tls.cipher(), getattr(tls, "server_name", None)
        found = {
            "SSL_PROTOCOL": tls.version(),
            "SSL_CIPHER": cipher[0] if cipher else None,
            # It may be anything: what is no name of a host is nobody's business.
            "SSL_TLS_SNI_SERVERNAME": name if name and _HOST.fullmatch(name) else None,
            "SSL_ALPN_PROTOCOL": tls.selected_alpn_protocol(),
        }
        if certificate := tls.getpeercert(binary_form=True):
            import hashlib  # late: it is for those who ask for certificates

            found["SSL_PEER_CERT_HASH"] = f"SHA256:{hashlib.sha256(certificate).hexdigest()}"
            subject = _subject((tls.getpeercert() or {}).get("subject", ()))
            found["SSL_PEER_CERT_SUBJECT"] = subject if 0 < len(subject) <= _SUBJECT_BYTES else None
        return {variable: value for variable, value in found.items() if value is not None}

    def open(self, held: Held) -> tuple[int, bytes]:
        """(the service's end, what its order says besides the peer). Raises OSError when there are no fds.

        The client's fd stays the gate's until `begin`.
        """
        ours, theirs = socket.socketpair()
        self._process = ours
        self._client_fd = held.fd
        self.peer = peer_text(held.fd, held.host, held.raw)
        more: dict[str, Any] = {"variables": self.variables()}
        local = held.local
        if held.host == "":
            more["unix"] = _unix_facts(held.fd)
            local = b"\0\0"
        elif not local:
            local = local_of(held.fd)
        return theirs.detach(), local + b"\0" + json.dumps(more).encode()

    def begin(self, service: ConnectionService, number: int) -> None:
        """The service has its end, or it could not be handed over, and then there is nothing to be carried."""
        row = service.connections.get(number)
        if row is None:
            os.close(self._client_fd)
            self._process.close()
            return
        row.peer = self.peer
        self._service, self._name = service, row.name
        self._sending = trio.Lock()
        self._carried = 0
        self._over = trio.Event()
        self._patience: Timer | None = None
        self.done = service.carried[number] = trio.Event()
        service.supervisor.watch.add(self._process.fileno(), lambda _: self._hung_up(), 0)
        self._scope = service.supervisor.start_task(functools.partial(self._run, number))

    # -- carrying

    async def _run(self, number: int) -> None:
        service = self._service
        watched = self._process.fileno()
        self._client = trio.socket.from_stdlib_socket(socket.socket(fileno=self._client_fd))
        process = trio.socket.from_stdlib_socket(self._process)
        try:
            with self._client, process:
                is_over = False
                try:
                    if self._client.family in (socket.AF_INET, socket.AF_INET6):
                        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                    await carry(self, _Process(process), self._over)
                    is_over = True
                except OSError:
                    is_over = True  # the client has gone already
                finally:
                    if not is_over:  # cancelled
                        self._carry_rest(process)
                    service.supervisor.watch.remove(watched)
        finally:
            del service.carried[number]
            self.done.set()
            if self._patience is not None:
                self._patience.cancel()  # it would keep all of this for a minute
            if self._over.is_set():
                service.lingering -= 1
                service.gate_has_room()
                service.look_whether_drained()

    def _hung_up(self) -> None:
        """Nobody has the service's end any more. Its place is free, so what is left to be carried has one in the
        gate."""
        service = self._service
        service.supervisor.watch.remove(self._process.fileno())
        service.lingering += 1
        self._over.set()
        self._wait_for_progress()

    def _wait_for_progress(self) -> None:
        before = self._carried

        def look() -> None:
            if self._carried != before:
                self._wait_for_progress()
            else:
                self._scope.cancel()

        self._patience = self._service.supervisor.timers.after(_STUCK_S, look)

    async def recv(self, size: int) -> bytes:
        """Plain bytes; b"" when the client has said that there are no more. Raises ssl.SSLError when it has not."""
        while True:
            data = None
            try:
                data = self._tls.read(size)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                data = b""
            except ssl.SSLError as error:
                self._cut(explain(error))
                raise
            if self._outgoing.pending:  # what a client that renews its keys is answered
                await self._flush()
            if data is not None:
                return data
            received = await self._client.recv(_CHUNK_BYTES)
            if received:
                self._incoming.write(received)
            else:
                self._incoming.write_eof()

    def _cut(self, why: str) -> None:
        if self._service.log.debugs:
            text = f"tls: the client ended without close_notify, what it sent may have been cut: {why}"
            self._service.log.record(
                "message", text, level="debug", service=self._service.name, connection=self._name, peer=self.peer
            )

    async def send(self, data: bytes | memoryview) -> int:
        self._tls.write(data)
        await self._flush()
        return len(data)

    async def shutdown(self, how: int) -> None:
        """close_notify, and the end."""
        self._say_end()
        await self._flush()
        self._client.shutdown(how)

    def _say_end(self) -> None:
        # After its own close_notify, OpenSSL asks for the client's, and would take anything else that is there for an
        # error. It may still be on its way to the process.
        rest = self._incoming.read()
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # usually that it has to be waited for
        if rest:
            self._incoming.write(rest)

    async def _flush(self) -> None:
        async with self._sending:
            while data := self._unsent or memoryview(self._outgoing.read(_CHUNK_BYTES)):
                self._unsent = data
                count = await self._client.send(data)  # all or nothing, if it is cancelled
                self._unsent = data[count:]
                self._carried += count

    def _carry_rest(self, process: trio.socket.SocketType) -> None:
        """superd ends: what the process has left goes as far as there is room for it, and then the end."""
        try:
            while (data := self._rest_of(process.fileno())) and self._flush_now(self._client.fileno()):
                self._tls.write(data)
            if data == b"":
                self._say_end()
            self._flush_now(self._client.fileno())
        except OSError:
            pass  # the client has gone

    def _rest_of(self, fd: int) -> bytes | None:
        """Some of it, b"" at its end; None: the process has not ended, and has nothing to say."""
        try:
            return os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""


class _Process:
    """The service's side of what is carried. A process that ends without having read everything resets its connection,
    after what it has written; its client is told the end all the same."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.send, self.shutdown = sock.send, sock.shutdown
        self._sock = sock

    async def recv(self, size: int) -> bytes:
        try:
            return await self._sock.recv(size)
        except ConnectionResetError:
            return b""


def _subject(names: Any) -> str:
    """As X509_NAME_oneline(3) has it, so that nothing in a value looks like another name."""
    found = ""
    for name, value in (pair for pairs in names for pair in pairs):
        escaped = "".join(
            chr(byte) if 32 <= byte < 127 and byte not in b"/\\" else f"\\x{byte:02X}" for byte in str(value).encode()
        )
        found += f"/{_SHORT.get(name, name)}={escaped}"
    return found


def _unix_facts(fd: int) -> dict[str, str]:
    """What a spawner would ask the client's socket, which it does not get."""
    try:
        with peers.Borrowed(fileno=fd) as sock:
            return peers.unix_facts(sock)
    except OSError:
        return {"text": "unix"}  # it has gone
