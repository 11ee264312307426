"""superd.core.keys: the table is complete, and each of its rows can be used."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from superd.core.keys import ALIASES, BY_TABLE, KEYS, Key
from superd.core.kinds import Kinds
from superd.core.spec import DaemonSpec, KeepAlive, Limits, ServiceSpec, SocketSpec

# Every key of the configuration contract, by table; written down here so that none gets lost.
CONTRACT = {
    "service": """description enabled listen command argv0 handler builtin run pass fd_protocols stderr stdout user
        group groups cwd umask environment environment_file pass_environment ready ready_timeout notify_access watchdog
        fdstore
        restart restart_delay restart_delay_max restart_limit success_status essential requires wants after part_of
        conflicts stop_signal stop_timeout kill_mode reload_signal idle_timeout start_pre start_post stop_post socket
        limits access rlimit scheduling cgroup sandbox health proxy workers instances""",
    "socket": """listen name backlog mode user group directory_mode remove_on_stop symlinks reuse_port free_bind
        transparent broadcast device no_delay keep_alive defer_accept receive_buffer send_buffer mark tos ttl priority
        congestion protocol pass_credentials pass_packet_info timestamping multicast nonblocking proxy_protocol
        proxy_trusted tls""",
    "keep_alive": "idle interval count",
    "tls": "certificate key sni client_ca client_certificate min_version alpn handshake_timeout",
    "limits": """max_connections on_full max_per_source rate rate_per_source refuse_message max_runtime
        first_byte_timeout max_load min_memory""",
    "access": "allow deny hours",
    "scheduling": "nice ioprio oom_score_adjust cpu_affinity",
    "cgroup": "memory_max pids_max cpu_max",
    "sandbox": """no_new_privileges chroot capabilities ambient_capabilities private_tmp private_network private_pids
        read_only read_write""",
    "health": "check every timeout failures then",
    "proxy": "to ready send_proxy_header",
    "superd": """defaults conf_dirs watch control control_mode control_group control_admins log log_level syslog
        stop_timeout""",
}


@pytest.mark.parametrize("table", CONTRACT)
def test_every_key_of_the_contract(table: str) -> None:
    assert set(BY_TABLE[table]) == set(CONTRACT[table].split())


def test_rlimits_are_those_of_the_kernel() -> None:
    import resource

    assert set(BY_TABLE["rlimit"]) <= {name[7:].lower() for name in dir(resource) if name.startswith("RLIMIT_")} | {
        "locks", "msgqueue", "nice", "rtprio", "rttime", "sigpending",
    }  # fmt: skip
    assert {"nofile", "nproc", "core", "cpu", "as", "data", "fsize", "stack", "memlock"} <= set(BY_TABLE["rlimit"])


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.table}.{key.name}")
def test_a_row_is_usable(key: Key) -> None:
    assert key.sentence.endswith(".") and "\n" not in key.sentence
    assert key.change in ("in place", "rebind", "restart")
    assert bool(key.choices) == (key.kind in ("choice", "choices", "builtin"))
    assert callable(getattr(Kinds, f"_{key.kind}", None))


def test_a_name_is_there_once_in_a_table() -> None:
    assert sum(map(len, BY_TABLE.values())) == len(KEYS)


@pytest.mark.parametrize(
    ("spec", "table"),
    [
        (ServiceSpec, "service"),
        (SocketSpec, "socket"),
        (Limits, "limits"),
        (KeepAlive, "keep_alive"),
        (DaemonSpec, "superd"),
    ],
)
def test_every_field_of_a_spec_has_a_key(spec: type, table: str) -> None:
    # From the file's name and from other keys.
    made = {"name", "source", "sockets", "context", "user_assumed", "notify_asked", "address", "pass_"}
    for field in fields(spec):
        assert field.name in made or field.name.removesuffix("_s") in BY_TABLE[table], field.name


def test_aliases_lead_to_keys() -> None:
    names = {key.name for key in KEYS}
    assert set(ALIASES.values()) <= names
    assert not {alias for alias in ALIASES if alias in BY_TABLE["service"]}


def test_this_table_is_the_contract() -> None:
    # tests/core/ stands two levels below the repository, whose man page describes the same keys
    page = Path(__file__).resolve().parents[2] / "man" / "superd.toml.5"
    if not page.exists():
        pytest.skip("man/superd.toml.5 is not there")
    text = page.read_text().replace("\\-", "-").replace("\\_", "_")
    missing = [f"{key.table}.{key.name}" for key in KEYS if key.name not in text]
    assert missing == []
