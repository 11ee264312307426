"""TLS in front of services, on real sockets: Python's ssl, openssl and curl as clients."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import require
from harness import PYTHON, TIMEOUT_S, Record, Superd, ask, eventually, fetch, open_fds, read_all, toml, wait_gone

CAT = ["/bin/cat"]
SAYS_BYE = ["/bin/sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done"]
MEGABYTE = bytes(range(256)) * 4096
V2, V3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


class Pki:
    """Certificates for localhost, by two authorities, and those of clients. Of root alone where superd is root."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.openssl = require("openssl")
        for ca in ("ca", "other"):
            self.make(ca, f"/CN={ca}")
        for name in ("server", "renewed"):
            self.make(name, "/CN=localhost", "ca", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        self.make("alice", "/C=DE/O=A\\/B=C/CN=Älice", "ca")
        self.make("mallory", "/CN=mallory", "other")

    def make(self, name: str, subject: str, ca: str = "", *extensions: str) -> None:
        words = [
            self.openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
            "2", "-utf8", "-subj", subject, "-keyout", self[f"{name}.key"], "-out", self[f"{name}.pem"],
        ]  # fmt: skip
        words += ["-CA", self[f"{ca}.pem"], "-CAkey", self[f"{ca}.key"]] if ca else []
        for extension in extensions:
            words += ["-addext", extension]
        subprocess.run(words, check=True, capture_output=True, timeout=TIMEOUT_S)
        os.chmod(self[f"{name}.key"], 0o600)

    def __getitem__(self, name: str) -> str:
        return str(self.room / name)

    def table(self, **more: Any) -> dict[str, Any]:
        return {"certificate": self["server.pem"], "key": self["server.key"], **more}

    def context(self, who: str = "") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self["ca.pem"])
        if who:
            context.load_cert_chain(self[f"{who}.pem"], self[f"{who}.key"])
        return context

    def fingerprint(self, name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert(Path(self[f"{name}.pem"]).read_text())


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    room = Path(tempfile.mkdtemp(prefix="superd-tls-"))
    room.chmod(0o755)
    yield Pki(room)
    shutil.rmtree(room)


def secured(superd: Superd, pki: Pki, name: str = "s", *, tls: dict[str, Any] | None = None, **keys: Any) -> None:
    table = {"listen": keys.pop("listen", "tcp:127.0.0.1:0"), **keys.pop("more", {}), "tls": pki.table(**(tls or {}))}
    if not {"handler", "builtin", "command"} & keys.keys():
        keys["command"] = CAT
    superd.write(name, toml(**keys, socket=[table]))


class Client:
    """A client that can end one direction and go on in the other, which ssl.SSLSocket cannot."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str | None = "localhost") -> None:
        """Does the handshake. The socket is closed with the block."""
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        if name is None:
            context.check_hostname = False
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)
        try:
            self._until(self.tls.do_handshake)
            self._flush()
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _flush(self) -> None:
        self.sock.sendall(self.outgoing.read())

    def _until(self, call: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                if data := self.sock.recv(65536):
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()

    def send(self, data: bytes) -> None:
        self.tls.write(data)
        self._flush()

    def recv(self) -> bytes:
        """What is there next; b"" for the server's close_notify. Raises ssl.SSLEOFError for an end without that."""
        try:
            return bytes(self._until(self.tls.read, 65536))
        except ssl.SSLZeroReturnError:  # b"" to who has said its own end
            return b""

    def rest(self) -> bytes:
        found = []
        while data := self.recv():
            found.append(data)
        return b"".join(found)

    def end(self) -> None:
        """close_notify, and nothing else: the server's direction goes on."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self._flush()

    def exchange(self, data: bytes) -> bytes:
        """Send all and say the end, reading meanwhile; everything up to the server's end."""
        self.tls.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        unsent, found = memoryview(self.outgoing.read()), b""
        self.sock.setblocking(False)
        while True:
            ready = select.select([self.sock], [self.sock] if unsent else [], [], TIMEOUT_S)
            assert any(ready), "nothing goes on"
            if ready[1]:
                unsent = unsent[self.sock.send(unsent[:65536]) :]
            if ready[0]:
                received = self.sock.recv(65536)
                self.incoming.write(received) if received else self.incoming.write_eof()
                try:
                    while part := self.tls.read(65536):
                        found += part
                    return found
                except ssl.SSLZeroReturnError:  # the same, as it is told to who has said its own end
                    return found
                except ssl.SSLWantReadError:
                    pass


def connect(superd: Superd, pki: Pki, name: str = "s", *, who: str = "", **settings: Any) -> Client:
    context = pki.context(who)
    for setting, value in settings.items():
        setattr(context, setting, value)
    return Client(superd.connect(name), context)


def narrow(address: tuple[str, int]) -> socket.socket:
    """A client of whom the kernel takes little that it has not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(TIMEOUT_S)
    sock.connect(address)
    return sock


def memory(superd: Superd) -> int:
    """Resident bytes of the manager."""
    return int(Path(f"/proc/{superd.manager}/statm").read_text().split()[1]) * 4096


def why(superd: Superd, after: int = 0, service: str = "s") -> str:
    return str(superd.wait_record(after=after, event="refused", service=service)["message"])


def status(superd: Superd, name: str = "s") -> Record:
    """With what `superctl list` has not."""
    return {**superd.status(name), **superd.call("Status", names=[name])["services"][0]}


def fails(superd: Superd, pki: Pki, name: str = "s", **settings: Any) -> str:
    """How the client sees that it is refused; of TLS 1.3 when it wants to read."""
    with pytest.raises((ssl.SSLError, ConnectionError)) as failed:
        with connect(superd, pki, name, **settings) as client:
            client.recv()
    return str(failed.value)


# -- bytes


@pytest.mark.parametrize("version", [V2, V3], ids=["1.2", "1.3"])
def test_a_megabyte_there_and_back(superd: Superd, pki: Pki, version: ssl.TLSVersion) -> None:
    secured(superd, pki)
    superd.start()
    with connect(superd, pki, maximum_version=version) as client:
        assert client.tls.version() == {V2: "TLSv1.2", V3: "TLSv1.3"}[version]
        assert client.exchange(MEGABYTE) == MEGABYTE
        client.sock.setblocking(True)
        assert client.sock.recv(1) == b""  # the end of TCP follows that of TLS
    assert superd.wait_record(event="exit", service="s")["status"] == 0


def test_the_client_ends_first(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, command=["/usr/bin/wc", "-c"])
    superd.start()
    with connect(superd, pki) as client:
        client.send(b"x" * 1000)
        client.end()
        assert client.rest() == b"1000\n"


def test_the_process_ends_its_direction_first(superd: Superd, pki: Pki) -> None:
    heard = superd.room("heard", user="nobody") / "heard"
    code = (
        "import socket; s = socket.socket(fileno=0); s.sendall(b'bye'); s.shutdown(socket.SHUT_WR)\n"
        f"d = b''\nwhile part := s.recv(65536): d += part\nopen({str(heard)!r}, 'wb').write(d)"
    )
    secured(superd, pki, command=[PYTHON, "-c", code])
    superd.start()
    with connect(superd, pki) as client:
        client.tls.write(MEGABYTE)
        sending = threading.Thread(target=client.sock.sendall, args=(client.outgoing.read(),))
        sending.start()  # superd has some of it in hand, which the process does not read yet
        assert client.rest() == b"bye"
        sending.join()
        client.send(b" here")
        client.end()
        superd.wait_record(event="exit", service="s", status=0)
    assert heard.read_bytes() == MEGABYTE + b" here"


def test_what_is_left_is_carried_when_the_process_has_gone(superd: Superd, pki: Pki) -> None:
    command, limits = ["/usr/bin/head", "-c", "150000", "/dev/zero"], {"max_connections": 1}
    secured(superd, pki, command=command, limits=limits, more={"send_buffer": 4608})
    superd.start()
    with Client(narrow(superd.address("s")), pki.context()) as client:
        superd.wait_record(event="exit", service="s", status=0)  # and its place is free
        with connect(superd, pki) as other:
            assert len(other.rest()) == 150000
        superd.call("Drain", names=["s"], wait=False)
        assert superd.status("s")["state"] == "stopping"  # somebody has not got everything
        assert client.rest() == bytes(150000)
    eventually(lambda: superd.status("s")["state"], "stopped")


def test_a_process_that_does_not_read_everything(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, command=["/bin/sh", "-c", "read line; echo got $line"])
    superd.start()
    for _ in range(10):
        with connect(superd, pki) as client:
            client.send(b"one\ntwo\n")
            assert client.rest() == b"got one\n"


def test_backpressure(superd: Superd, pki: Pki) -> None:
    """A client that does not read stops the process; superd does not gather what it writes."""
    secured(superd, pki, command=["/usr/bin/head", "-c", "50000000", "/dev/zero"])
    superd.start()

    before = memory(superd)
    with connect(superd, pki) as client:
        pid = superd.wait_record(event="start", service="s")["pid"]
        eventually(lambda: "unix_stream_" in Path(f"/proc/{pid}/wchan").read_text() or
                   "sock_alloc" in Path(f"/proc/{pid}/wchan").read_text(), True)  # fmt: skip
        assert memory(superd) - before < 8 << 20
        assert len(client.rest()) == 50000000


def test_a_cut_connection_is_no_end(superd: Superd, pki: Pki) -> None:
    """Without close_notify the process cannot answer any more, and the log tells."""
    said = superd.room("said", user="nobody") / "said"
    script = f"cat >/dev/null; trap '' PIPE; echo late 2>/dev/null && echo yes >{said} || echo no >{said}"
    secured(superd, pki, command=["/bin/sh", "-c", script])
    superd.write_daemon('log_level = "debug"\n')
    superd.start()
    with connect(superd, pki) as client:
        client.send(b"hello")
        client.sock.shutdown(socket.SHUT_WR)  # as whoever stands in between could
        superd.wait_record(event="exit", service="s")
    assert said.read_text() == "no\n"
    assert "without close_notify" in superd.wait_record(level="debug", service="s", event="message")["message"]


# -- real clients


def test_openssl(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, command=["/bin/sh", "-c", "read line; echo got $line; env | grep ^SSL | sort"])
    superd.start()
    host, port = superd.address("s")
    words = [pki.openssl, "s_client", "-quiet", "-verify_return_error", "-CAfile", pki["ca.pem"], "-connect"]
    done = subprocess.run(
        [*words, f"{host}:{port}", "-servername", "localhost"], input=b"hello\n", capture_output=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        b"got hello", b"SSL_CIPHER=TLS_AES_256_GCM_SHA384", b"SSL_PROTOCOL=TLSv1.3",
        b"SSL_TLS_SNI_SERVERNAME=localhost",
    ]  # fmt: skip


def test_curl(superd: Superd, pki: Pki) -> None:
    answer = "read line; printf 'HTTP/1.0 200 OK\\r\\n\\r\\nhello over %s' $SSL_PROTOCOL"
    secured(superd, pki, command=["/bin/sh", "-c", answer], tls={"alpn": ["http/1.1"]})
    superd.start()
    host, port = superd.address("s")
    words = [require("curl"), "-sS", "--http1.1", "--cacert", pki["ca.pem"], f"https://{host}:{port}/"]
    done = subprocess.run(words, capture_output=True, timeout=TIMEOUT_S)
    assert (done.stdout, done.stderr) == (b"hello over TLSv1.3", b"")


# -- what is agreed on


def test_certificates_of_clients(superd: Superd, pki: Pki) -> None:
    show = ["/bin/sh", "-c", "env | grep ^SSL_PEER | sort"]
    for name, words in (("required", {}), ("optional", {"client_certificate": "optional"})):
        secured(superd, pki, name, command=show, tls={"client_ca": pki["ca.pem"], **words})
    superd.start()
    digest = hashlib.sha256(pki.fingerprint("alice")).hexdigest()
    told = f"SSL_PEER_CERT_HASH=SHA256:{digest}\nSSL_PEER_CERT_SUBJECT=/C=DE/O=A\\x2FB=C/CN=\\xC3\\x84lice\n"
    for name in ("required", "optional"):
        for version in (V2, V3):
            with connect(superd, pki, name, who="alice", maximum_version=version) as client:
                assert client.rest().decode() == told
        mark = superd.mark()
        assert "UNKNOWN_CA" in fails(superd, pki, name, who="mallory")  # the alert came through
        assert why(superd, mark, name).startswith("tls: the client's certificate: unable to get local issuer")
    with connect(superd, pki, "optional") as client:
        assert client.rest() == b""
    assert "CERTIFICATE_REQUIRED" in fails(superd, pki, "required")
    assert superd.wait_record(service="required", message="tls: peer did not return a certificate")
    assert status(superd, "required")["total"] == 2 and status(superd, "required")["refused"] == 2


def test_versions(superd: Superd, pki: Pki) -> None:
    secured(superd, pki)
    secured(superd, pki, "new", tls={"min_version": "1.3"})
    superd.start()
    assert "PROTOCOL_VERSION" in fails(superd, pki, "new", maximum_version=V2)
    assert why(superd, service="new") == "tls: unsupported protocol"
    with connect(superd, pki, "new") as client:
        assert client.tls.version() == "TLSv1.3"
    old = pki.context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Client(superd.connect("s"), old)
    assert why(superd) == "tls: unsupported protocol"


def test_certificates_by_name(superd: Superd, pki: Pki) -> None:
    """With all that the socket says besides."""
    sni = {
        '"Alice.Example.org"': {"certificate": pki["alice.pem"], "key": pki["alice.key"]},
        '"*.example.org"': {"certificate": pki["mallory.pem"], "key": pki["mallory.key"]},
    }
    tls = {"sni": sni, "client_ca": pki["ca.pem"], "alpn": ["a"]}
    secured(superd, pki, tls=tls, command=["/bin/sh", "-c", "echo $SSL_TLS_SNI_SERVERNAME $SSL_PEER_CERT_SUBJECT"])
    superd.start()
    context = pki.context("renewed")
    context.set_alpn_protocols(["a"])
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, shown in (
        ("localhost", "server"), ("alice.example.org", "alice"), ("ALICE.example.ORG", "alice"),
        ("bob.example.org", "mallory"), ("x.bob.example.org", "server"), ("example.org", "server"),
    ):  # fmt: skip
        for version in (V2, V3):
            context.maximum_version = version
            with Client(superd.connect("s"), context, name) as client:
                assert client.tls.getpeercert(binary_form=True) == pki.fingerprint(shown)
                assert client.tls.selected_alpn_protocol() == "a"
                assert client.rest().decode() == f"{name} /CN=localhost\n"
    stranger = pki.context("mallory")
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, ConnectionError)):
        with Client(superd.connect("s"), stranger, "alice.example.org") as client:
            client.recv()


def test_alpn(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, command=["/bin/sh", "-c", "echo $${SSL_ALPN_PROTOCOL-none}"], tls={"alpn": ["b", "a"]})
    superd.start()
    for offered, chosen in ((["a", "b"], "b"), (["a"], "a"), (["c"], None), ([], None)):
        context = pki.context()
        if offered:
            context.set_alpn_protocols(offered)
        with Client(superd.connect("s"), context) as client:
            assert client.tls.selected_alpn_protocol() == chosen
            assert client.rest().decode() == f"{chosen or 'none'}\n"


def test_the_client_s_own_addresses(superd: Superd, pki: Pki) -> None:
    names = "PROTO REMOTE_ADDR REMOTE_PORT TCPREMOTEIP TCPREMOTEPORT TCPLOCALIP TCPLOCALPORT TCPCONNNUM IPCREMOTEEUID"
    words = [f"${name}" for name in names.split()] + ["$${SSL_TLS_SNI_SERVERNAME-none}", "$${SSL_PEER_CERT_HASH-none}"]
    show = ["/bin/sh", "-c", f"echo {' '.join(words)}"]
    secured(superd, pki, command=show)
    secured(superd, pki, "wide", command=show, listen="tcp:0")
    secured(superd, pki, "unix", command=show, listen=f"unix:{superd.dir}/s")
    superd.start()
    for name in ("s", "wide"):
        with connect(superd, pki, name) as client:
            (host, port), (local, local_port) = client.sock.getsockname()[:2], client.sock.getpeername()[:2]
            said = f"TCP {host} {port} {host} {port} {local} {local_port} 1 localhost none\n"
            assert client.rest().decode() == said
            assert superd.wait_record(event="start", service=name)["peer"] == f"{host}:{port}"
    with Client(superd.connect("unix"), pki.context(), None) as client:
        assert client.rest().decode() == f"IPC {os.geteuid()} none none\n"
    peer = superd.wait_record(event="start", service="unix")["peer"]
    assert peer == f"pid {os.getpid()} uid {os.geteuid()}"


@pytest.mark.parametrize("name", [b"a\xff\xfe", b"a b"])
def test_strange_server_names(superd: Superd, pki: Pki, name: bytes) -> None:
    """What is no name of a host does not come into the environment, and no traceback into the log."""
    secured(superd, pki, command=["/bin/sh", "-c", "echo $${SSL_TLS_SNI_SERVERNAME-none}"])
    superd.start()
    context = pki.context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context.check_hostname = False
    tls = context.wrap_bio(incoming, outgoing, server_hostname="y" * len(name))
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    with superd.connect("s") as client:
        client.sendall(hello.replace(b"y" * len(name), name))
        client.settimeout(TIMEOUT_S)
        client.recv(100)
    assert why(superd).startswith("tls: ")  # the client's own hash of the handshake is another now, or the name is none
    assert superd.garbage == []
    with Client(superd.connect("s"), context, "() { :;}; x") as client:
        assert client.rest() == b"none\n"


# -- clients that do something else


def test_no_tls(superd: Superd, pki: Pki) -> None:
    secured(superd, pki)
    superd.start()
    for said, reason in (
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "tls: not TLS: the client speaks plain HTTP"),
        (b"EHLO there\r\n", "tls: not TLS"),
        (b"\x16\x03\x01\x00\x05hello", "tls: "),
        (b"", "tls: the client ended its handshake"),
    ):
        mark = superd.mark()
        with superd.connect("s") as client:
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            read_all(client)
        assert why(superd, mark).startswith(reason)
    found = status(superd)
    assert (found["refused"], found["total"]) == (4, 0)
    with superd.connect("s") as client:  # a reset in the midst
        client.sendall(b"\x16\x03\x01")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: status(superd)["refused"], 5)
    with connect(superd, pki) as client:
        assert client.exchange(b"hello") == b"hello"


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "begun"])
def test_handshake_timeout(superd: Superd, pki: Pki, said: bytes) -> None:
    secured(superd, pki, tls={"handshake_timeout": "300ms"})
    superd.start()
    with superd.connect("s") as client:
        client.sendall(said)
        assert client.recv(1) == b""
    assert why(superd).startswith("tls: no handshake within handshake_timeout")
    assert status(superd)["total"] == 0 and superd.find_records(event="start", service="s") == []


def test_first_byte_timeout_is_that_of_the_handshake(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, limits={"first_byte_timeout": "300ms"}, command=["/bin/echo", "hello"])
    superd.start()
    with superd.connect("s") as client:
        assert client.recv(1) == b""
    assert why(superd).startswith("nothing came within first_byte_timeout = 0.3 s")
    with connect(superd, pki) as client:  # the service speaks first
        assert client.rest() == b"hello\n"


def test_silent_clients_are_in_nobody_s_way(superd: Superd, pki: Pki) -> None:  # B1
    secured(superd, pki, limits={"max_connections": 2})
    superd.start()
    with ExitStack() as stack:
        silent = [stack.enter_context(superd.connect("s")) for _ in range(200)]
        for client in silent[100:]:
            client.sendall(b"\x16\x03\x01")
        with connect(superd, pki) as good:
            assert good.exchange(b"hello") == b"hello"
        assert status(superd)["now"] == 0
        superd.call("Stop", names=["s"])
        assert {client.recv(1) for client in silent} == {b""}


# -- certificates on disk


def test_a_renewed_certificate(superd: Superd, pki: Pki) -> None:
    room = superd.room("live")
    table = {"certificate": room / "cert.pem", "key": room / "key.pem"}

    def put(name: str, key: str | None = None) -> None:
        for source, target in ((f"{name}.pem", "cert.pem"), (f"{key or name}.key", "key.pem")):
            shutil.copy(pki[source], room / "new")
            os.replace(room / "new", room / target)

    def seen() -> bytes:
        with connect(superd, pki) as client:
            return client.tls.getpeercert(binary_form=True) or b""

    put("server")
    secured(superd, pki, tls=table)
    superd.start()
    old, new = pki.fingerprint("server"), pki.fingerprint("renewed")
    with connect(superd, pki) as lives:
        assert seen() == old
        put("renewed")
        eventually(seen, new)
        assert lives.exchange(b"hello") == b"hello"
    superd.wait_record(service="s", message=f"certificate {room}/cert.pem read anew")

    put("server", "alice")  # a key of another certificate
    for _ in range(3):
        mark = superd.mark()
        eventually(lambda: (seen(), bool(superd.find_records(service="s", level="err"))), (new, True))
    (said,) = superd.find_records(service="s", level="err")
    assert (
        said["message"] == f"tls: cannot use the certificate {room}/cert.pem: key values mismatch; the old one goes on"
    )
    assert "key values mismatch" in status(superd)["note"]
    put("server")
    mark = superd.mark()
    eventually(seen, old)
    superd.wait_record(after=mark - 5, service="s", message=f"certificate {room}/cert.pem read anew")
    assert status(superd)["note"] == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is careful")
def test_a_key_that_becomes_readable_is_not_used(superd: Superd, pki: Pki) -> None:
    room = superd.room("live")
    for name in ("server.pem", "server.key"):
        shutil.copy(pki[name], room)
    secured(superd, pki, tls={"certificate": room / "server.pem", "key": room / "server.key"})
    superd.start()
    connect(superd, pki).sock.close()
    os.chmod(room / "server.key", 0o644)
    eventually(lambda: connect(superd, pki).sock.close() or "readable by everybody" in status(superd)["note"], True)
    os.chmod(room / "server.key", 0o640)  # of a group: that is how Debian has its own
    eventually(lambda: connect(superd, pki).sock.close() or status(superd)["note"], "")


def test_files_that_cannot_be_used_at_first(superd: Superd, pki: Pki) -> None:
    """Nothing that the loader sees is wrong. The other socket of the service goes on."""
    room = superd.room("live")
    (room / "c").write_text("no certificate\n")
    (room / "k").write_text("")
    os.chmod(room / "k", 0o600)
    tables = [
        {"listen": "tcp:127.0.0.1:0", "tls": {"certificate": room / "c", "key": room / "k"}},
        {"listen": "tcp:127.0.0.1:0"},
    ]
    superd.write("s", toml(command=CAT, socket=tables))
    superd.start()
    said = f"tls: cannot use the certificate {room}/c: it does not hold a certificate and its key in PEM"
    assert said in superd.wait_record(service="s", level="err")["message"]
    assert status(superd)["note"].startswith("tls: cannot use the certificate")
    fails(superd, pki)
    assert why(superd) == "tls: no certificate that could be used"
    assert ask(superd.connect("s", 1), b"plain") == b"plain"
    shutil.copy(pki["server.key"], room / "k")
    shutil.copy(pki["server.pem"], room / "c")

    def works() -> bool:
        try:
            with connect(superd, pki) as client:
                return client.exchange(b"hello") == b"hello"
        except (ssl.SSLError, ConnectionError):
            return False

    eventually(works, True)
    assert status(superd)["note"] == ""


def test_a_passphrase_is_not_asked_for(superd: Superd, pki: Pki) -> None:
    room = superd.room("live")
    words = [pki.openssl, "pkey", "-in", pki["server.key"], "-aes256", "-passout", "pass:secret", "-out", room / "k"]
    subprocess.run(words, check=True, capture_output=True, timeout=TIMEOUT_S)
    os.chmod(room / "k", 0o600)
    secured(superd, pki, tls={"key": room / "k"})
    superd.start()
    assert f"{room}/k has a passphrase; clients are refused" in superd.wait_record(service="s", level="err")["message"]


def test_check(superd: Superd, pki: Pki) -> None:
    from superd.system.configdir import exposed, load_config, unreadable

    secured(superd, pki, tls={"key": superd.dir / "none"})
    _, problems = load_config([str(superd.conf)], environ=dict(os.environ))
    assert [(p.code, p.line) for p in problems] == [("unreadable", 2)]
    key = superd.dir / "key"
    key.write_text("x")
    key.chmod(0o644)
    assert exposed(str(key)) == f"{key} is readable by everybody (mode 0644)"
    key.chmod(0o640)
    assert exposed(str(key)) is None and unreadable(str(key)) is None
    assert unreadable(str(superd.dir)) == f"{superd.dir}: not a regular file"


# -- beside the rest of superd


def test_limits_and_access(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, limits={"max_connections": 1, "on_full": "refuse"})
    secured(superd, pki, "one", limits={"max_per_source": 1})
    secured(superd, pki, "closed", access={"deny": ["127.0.0.1"]})
    secured(superd, pki, "waits", limits={"max_connections": 1})
    superd.start()
    for name, reason in (("s", "full"), ("one", "too many connections from"), ("closed", "access: ")):
        with ExitStack() as stack:
            if name != "closed":
                stack.enter_context(connect(superd, pki, name)).send(b"x")
                superd.wait_record(event="start", service=name)
            fails(superd, pki, name)
            assert reason in why(superd, service=name)
    with connect(superd, pki, "waits") as first:
        superd.wait_record(event="start", service="waits")
        waiting = superd.connect("waits")
        waiting.sendall(b"")
        assert first.exchange(b"first") == b"first"
    with Client(waiting, pki.context()) as second:
        assert second.exchange(b"second") == b"second"


def test_max_runtime(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, limits={"max_runtime": "300ms"})
    superd.start()
    with connect(superd, pki) as client:
        client.send(b"hello")
        assert client.rest() == b"hello"
    assert superd.wait_record(event="exit", service="s")["signal"] == "TERM"


def test_drain_lets_clients_finish(superd: Superd, pki: Pki) -> None:
    secured(superd, pki)
    superd.start()
    with connect(superd, pki) as client:
        client.send(b"a")
        assert client.recv() == b"a"
        (superd.conf / "conf.d" / "s.toml").unlink()
        superd.wait_record(event="reload")
        client.send(b"b")
        assert client.recv() == b"b"
        assert client.exchange(b"c") == b"c"
    eventually(lambda: superd.call("List")["services"], [])


def test_stop(superd: Superd, pki: Pki) -> None:
    """Processes are told, what they say then still goes out, and the next client waits for the next start."""
    secured(superd, pki, command=SAYS_BYE)
    superd.start()
    with connect(superd, pki) as client:
        assert client.recv() == b"ready\n"
        superd.call("Stop", names=["s"])
        assert client.rest() == b"bye\n"
    superd.call("Start", names=["s"])
    with connect(superd, pki) as client:
        assert client.recv() == b"ready\n"


def test_the_end_of_superd_says_the_end(superd: Superd, pki: Pki) -> None:
    secured(superd, pki, command=SAYS_BYE)
    superd.start()
    with connect(superd, pki) as client:
        assert client.recv() == b"ready\n"
        superd.stop()
        assert client.rest() == b"bye\n"


def test_a_killed_manager(superd: Superd, pki: Pki) -> None:
    secured(superd, pki)
    superd.start()
    with connect(superd, pki) as client:
        client.send(b"hello")
        assert client.recv() == b"hello"
        pid = superd.wait_record(event="start", service="s")["pid"]
        superd.kill_role("superd-manager")
        with pytest.raises((ssl.SSLEOFError, ConnectionError)):
            client.rest()
    wait_gone(pid)
    with connect(superd, pki) as client:
        assert client.exchange(b"again") == b"again"


def test_it_comes_and_goes(superd: Superd, pki: Pki) -> None:
    """A reload changes it for the next connections; the listener stays, and so do clients, in the handshake too."""
    table = {"listen": f"unix:{superd.dir}/s"}
    superd.write("s", toml(command=CAT, socket=[table]))
    superd.start()
    with superd.connect("s") as plain:
        plain.sendall(b"a")
        assert plain.recv(1) == b"a"
        superd.write("s", toml(command=CAT, socket=[{**table, "tls": pki.table()}]))
        superd.wait_record(event="reload")
        begun = superd.connect("s")
        context = pki.context()
        with Client(superd.connect("s"), context, None) as client:
            client.send(b"b")
            assert client.recv() == b"b"
            mark = superd.mark()
            superd.write("s", toml(command=CAT, socket=[{**table, "tls": pki.table(min_version="1.3")}]))
            superd.wait_record(event="reload", after=mark)
            with Client(begun, context, None) as late:
                assert late.exchange(b"late") == b"late"
            mark = superd.mark()
            superd.write("s", toml(command=CAT, socket=[table]))
            superd.wait_record(event="reload", after=mark)
            assert client.exchange(b"c") == b"c"
        assert ask(superd.connect("s"), b"plain") == b"plain"
        plain.sendall(b"d")
        assert plain.recv(1) == b"d"


def test_handler_builtin_and_fds(superd: Superd, pki: Pki) -> None:
    room = superd.room("code")
    (room / "shout.py").write_text(
        "import os, socketserver\n"
        "def serve(conn):\n"
        "    conn.output.write(conn.input.read().upper() + os.environ['SSL_PROTOCOL'].encode())\n"
        "    conn.output.write(f' {conn.remote_addr} {conn.remote_port} {conn.local_port}'.encode())\n"
        "class Old(socketserver.StreamRequestHandler):\n"
        "    def handle(self):\n"
        "        self.wfile.write(repr(self.client_address).encode())\n"
    )
    secured(superd, pki, handler="shout:serve", cwd=str(room))
    secured(superd, pki, "old", handler="shout:Old", cwd=str(room))
    secured(superd, pki, "echo", builtin="echo")
    read = (
        "import socket, os; s = socket.socket(fileno=3); s.sendall(s.recv(100) + os.environ['LISTEN_FDNAMES'].encode())"
    )
    secured(superd, pki, "fds", command=[PYTHON, "-c", read], pass_="listen-fds")
    superd.start()
    with connect(superd, pki) as client:
        port, local = client.sock.getsockname()[1], client.sock.getpeername()[1]
        assert client.exchange(b"hello ") == f"HELLO TLSv1.3 127.0.0.1 {port} {local}".encode()
    with connect(superd, pki, "old") as client:
        assert client.rest() == repr(client.sock.getsockname()).encode()
    with connect(superd, pki, "echo") as client:
        assert client.exchange(MEGABYTE) == MEGABYTE
    with connect(superd, pki, "fds") as client:
        client.send(b"hello ")
        assert client.rest() == b"hello connection"


def test_in_front_of_a_program_that_listens_itself(superd: Superd, pki: Pki) -> None:
    code = (
        "import socketserver, sys\n"
        "class Echo(socketserver.StreamRequestHandler):\n"
        "    def handle(self):\n"
        "        self.wfile.write(self.rfile.read())\n"
        "socketserver.ThreadingTCPServer(('127.0.0.1', int(sys.argv[1])), Echo).serve_forever()\n"
    )
    secured(
        superd,
        pki,
        command=[PYTHON, "-c", code, "${port}"],
        proxy={"to": "tcp:127.0.0.1:${port}", "send_proxy_header": 1},
    )
    superd.start()
    with connect(superd, pki) as client:
        port, local = client.sock.getsockname()[1], client.sock.getpeername()[1]
        header = f"PROXY TCP4 127.0.0.1 127.0.0.1 {port} {local}\r\n".encode()
        assert client.exchange(MEGABYTE) == header + MEGABYTE


def test_behind_a_proxy(superd: Superd, pki: Pki) -> None:
    """Its header comes first, in clear."""
    more = {"proxy_protocol": True, "proxy_trusted": ["127.0.0.1"]}
    show = ["/bin/sh", "-c", "echo $TCPREMOTEIP $TCPREMOTEPORT $TCPLOCALIP $TCPLOCALPORT $SSL_PROTOCOL"]
    secured(superd, pki, command=show, more=more)
    superd.start()
    sock = superd.connect("s")
    sock.sendall(b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n")
    with Client(sock, pki.context()) as client:
        assert client.rest() == b"192.0.2.1 5000 198.51.100.2 443 TLSv1.3\n"
    assert superd.wait_record(event="start", service="s")["peer"] == "192.0.2.1:5000"
    fails(superd, pki)  # it is no header
    assert why(superd) == "proxy_protocol: what the client says is no header"


def test_nothing_is_left_of_connections(superd: Superd, pki: Pki) -> None:
    secured(superd, pki)
    superd.start()

    def fds() -> int:
        """But for one for each spawner; a second one may come."""
        return len(open_fds(superd.manager)) - len(superd.pids()["superd-spawner"])

    with connect(superd, pki) as client:
        assert client.exchange(b"x") == b"x"
    superd.wait_records(1, event="exit", service="s")
    before, bytes_before = fds(), 0
    for number in range(250):
        if number == 50:
            bytes_before = memory(superd)
        if number % 10 == 0:  # refused
            with superd.connect("s") as plain:
                plain.sendall(b"plain")
                fetch(plain)
            continue
        with connect(superd, pki) as client:
            if number % 10 == 1:  # reset
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif number % 10 > 2:  # 2: cut
                assert client.exchange(b"x") == b"x"
    eventually(lambda: (status(superd)["now"], fds() <= before), (0, True))
    grown = memory(superd) - bytes_before
    assert grown < 3 << 20, grown  # 6 MB, when half of them left what they had


@pytest.mark.parametrize("trace", [[], ["--trace"]], ids=["", "trace"])
def test_run_once(pki: Pki, trace: list[str]) -> None:
    """It ends when the client has all of it."""
    files = ["--tls.certificate", pki["server.pem"], "--tls.key", pki["server.key"]]
    words = [
        *files,
        "--log",
        "json",
        "--once",
        *trace,
        "--send-buffer",
        "4608",
        "--print-address",
        "tcp:127.0.0.1:0",
        "--",
    ]
    program, said = ["/usr/bin/head", "-c", "100" if trace else "150000", "/dev/zero"], ""
    superd = subprocess.Popen(
        [sys.executable, "-m", "superd", "run", *words, *program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=pki.room,
    )  # fmt: skip
    assert superd.stdout is not None and superd.stderr is not None
    with superd.stdout, superd.stderr:
        port = int(superd.stdout.readline().rpartition(":")[2])
        with Client(narrow(("127.0.0.1", port)), pki.context()) as client:
            while "exit" not in (line := superd.stderr.readline()):
                said += line
            assert len(client.rest()) == int(program[2])
        assert superd.wait(TIMEOUT_S) == 0
        assert ("< \\\\x00" in said + superd.stderr.read()) is bool(trace)


def test_only_who_has_it_pays_for_it(superd: Superd, pki: Pki) -> None:
    """trio itself imports ssl; what superd adds to that, and all of it in spawners, comes with the first `tls`."""
    code = (
        "import sys, superd.manager.main, superd.manager.proxy\n"
        "assert 'superd.manager.tls' not in sys.modules\n"
        "import superd.keeper, superd.spawner\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)
    code = "import sys, superd.keeper, superd.spawner; sys.exit('ssl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)
    secured(superd, pki)
    superd.start()
    with connect(superd, pki) as client:
        assert client.exchange(b"x") == b"x"
    for role in ("superd-keeper", "superd-spawner"):
        for pid in superd.pids()[role]:
            assert "libssl" not in Path(f"/proc/{pid}/maps").read_text()
