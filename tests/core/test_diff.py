"""superd.core.diff: what a change takes, and that a plan leads from one Snapshot to the other."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.diff import Plan, apply, compare, diff, match_sockets
from superd.core.keys import BY_TABLE
from superd.core.spec import (
    Address,
    Cgroup,
    Context,
    DaemonSpec,
    Health,
    KeepAlive,
    Limits,
    Output,
    RateSpec,
    Ready,
    RestartPolicy,
    ServiceSpec,
    Snapshot,
    SocketSpec,
)


def socket(address: str = "tcp:7", **keys: Any) -> SocketSpec:
    scheme, _, rest = address.partition(":")
    where = Address("unix", path=rest) if scheme == "unix" else Address(scheme, port=int(rest))  # type: ignore[arg-type]
    return SocketSpec(where, **{"name": "s", **keys})


BASE = ServiceSpec("s", "s.toml", ("/bin/cat",), "per-connection", "stdio", (socket(),))
LONG = replace(BASE, run="always-on", pass_="listen-fds")


CHANGES: list[tuple[ServiceSpec, dict[str, Any], str, tuple[str, ...]]] = [
    (BASE, {}, "in place", ()),
    (BASE, {"description": "x"}, "in place", ("description",)),
    (BASE, {"source": "x"}, "in place", ("file",)),
    (BASE, {"user_assumed": True}, "in place", ()),
    (BASE, {"command": ("/bin/ls",)}, "restart", ("command",)),
    (BASE, {"pass_": "listen-fds"}, "restart", ("pass",)),
    (BASE, {"run": "on-demand"}, "restart", ("run",)),
    (BASE, {"stderr": Output("null")}, "restart", ("stderr",)),
    (BASE, {"enabled": False}, "in place", ("enabled",)),
    (BASE, {"limits": Limits(5)}, "in place", ("limits.max_connections",)),
    (BASE, {"limits": Limits(max_runtime_s=1.0)}, "in place", ("limits.max_runtime",)),
    (BASE, {"context": Context("www")}, "restart", ("user",)),
    (BASE, {"context": Context(umask=0, nice=1)}, "restart", ("umask", "scheduling.nice")),
    (BASE, {"context": Context(rlimits=(("core", 0, None),))}, "restart", ("rlimit.core",)),
    (BASE, {"context": Context(no_new_privileges=False)}, "restart", ("sandbox.no_new_privileges",)),
    (LONG, {"restart": RestartPolicy("always", 1.0)}, "in place", ("restart", "restart_delay")),
    (LONG, {"restart": RestartPolicy(limit=RateSpec(1, 1.0))}, "in place", ("restart_limit",)),
    (LONG, {"stop_timeout_s": None}, "in place", ("stop_timeout",)),
    (LONG, {"ready_timeout_s": None, "command": ("/x",)}, "restart", ("command", "ready_timeout")),
    (LONG, {"cgroup": Cgroup(pids_max=5)}, "in place", ("cgroup.pids_max",)),
    (BASE, {"cgroup": Cgroup(9999), "context": Context(owner="s", grouped=True)}, "in place", ("cgroup.memory_max",)),
    (BASE, {"context": Context(owner="s", private_pids=True)}, "restart", ("sandbox.private_pids",)),
    (LONG, {"health": Health(Ready("connect"))}, "in place", ("health",)),
    (LONG, {"requires": ("x",)}, "in place", ("requires",)),
    (BASE, {"sockets": (socket("tcp:8"),)}, "rebind", ("listen",)),
    (BASE, {"sockets": (socket(), socket("tcp:8"))}, "rebind", ("listen",)),
    (LONG, {"sockets": (socket(), socket("tcp:8"))}, "restart", ("listen",)),
    (BASE, {"sockets": (socket(protocol="mptcp"),)}, "rebind", ("listen",)),
    (BASE, {"sockets": (socket(backlog=5),)}, "in place", ("socket.backlog",)),
    (BASE, {"sockets": (socket(defer_accept_s=5.0),)}, "in place", ("socket.defer_accept",)),
    (LONG, {"sockets": (socket(keep_alive=KeepAlive()),)}, "in place", ("socket.keep_alive",)),
    (LONG, {"sockets": (socket(name="x"),)}, "restart", ("socket.name",)),
]  # fmt: skip


@pytest.mark.parametrize("old, keys, action, named", CHANGES)
def test_what_a_change_takes(old: ServiceSpec, keys: dict[str, Any], action: str, named: tuple[str, ...]) -> None:
    assert compare(old, replace(old, **keys)) == (action, named)


def test_order_of_sockets() -> None:  # O4
    two = socket("tcp:8")
    for base, action in ((BASE, "in place"), (LONG, "restart")):
        assert compare(replace(base, sockets=(socket(), two)), replace(base, sockets=(two, socket())))[0] == action


def test_port_0_twice() -> None:
    one, two = socket("tcp:0", name="one"), socket("tcp:0", name="two")
    assert match_sockets((one, two), (two, one)) == [1, 0]
    assert match_sockets((one,), (two, one)) == [0, None] or match_sockets((one,), (two, one)) == [None, 0]
    assert match_sockets((one, two), (two,)) == [1]


def test_every_field_has_a_key() -> None:
    """Of each a change can be told, and is of a class."""
    other: dict[str, Any] = {
        "name": "s", "sockets": (), "context": Context(cwd="/x"), "restart": RestartPolicy("always"),
        "limits": Limits(1), "cgroup": Cgroup(1 << 20), "health": Health(Ready("connect")),
    }  # fmt: skip
    for field in fields(ServiceSpec):
        _, keys = compare(LONG, replace(LONG, **{field.name: other.get(field.name, object())}))
        assert field.name in ("name", "user_assumed") or len(keys) == 1, field.name
    for kind, prefix, changed in (
        (Limits, "limits", lambda x: {"limits": x}), (RestartPolicy, "service", lambda x: {"restart": x}),
        (Cgroup, "cgroup", lambda x: {"cgroup": x}),
        (SocketSpec, "socket", lambda x: {"sockets": (x,)}), (Context, "", lambda x: {"context": x}),
    ):  # fmt: skip
        base: Any = socket() if kind is SocketSpec else kind()
        start = replace(LONG, **changed(base))
        for field in fields(kind):
            if field.name not in ("address", "rlimits", "owner", "grouped"):
                _, keys = compare(start, replace(start, **changed(replace(base, **{field.name: object()}))))
                assert len(keys) == 1 and (not prefix or keys[0].rpartition(".")[2] in BY_TABLE[prefix]), field.name


SPECS = st.builds(
    lambda name, command, run, port, enabled, most: replace(
        BASE, name=name, command=(command,), run=run, enabled=enabled, limits=Limits(most),
        sockets=tuple(socket(f"tcp:{number}") for number in port),
    ),
    st.sampled_from("abcdef"), st.sampled_from(["/x", "/y"]), st.sampled_from(["per-connection", "always-on"]),
    st.lists(st.integers(0, 3), max_size=2), st.booleans(), st.integers(1, 2),
)  # fmt: skip
SNAPSHOTS = st.builds(
    lambda specs, level, broken: Snapshot(DaemonSpec(log_level=level), {spec.name: spec for spec in specs}, broken),
    st.lists(SPECS, max_size=6), st.sampled_from(["info", "debug"]),
    st.dictionaries(st.sampled_from("xyz"), st.just("wrong"), max_size=2),
)  # fmt: skip


@given(SNAPSHOTS, SNAPSHOTS)
def test_a_plan_leads_there(old: Snapshot, new: Snapshot) -> None:
    plan = diff(old, new)
    found = apply(plan, old)
    assert found == new and list(found.services) == list(new.services)
    assert not diff(new, found)
    assert bool(plan) == (old.services != new.services or old.daemon != new.daemon)
    for entry in plan.entries:
        assert (entry.old, entry.new) == (old.services.get(entry.name), new.services.get(entry.name))


@given(SNAPSHOTS, SNAPSHOTS, st.sets(st.sampled_from("abcdef")))
def test_some_stay_as_they_were(old: Snapshot, new: Snapshot, names: set[str]) -> None:  # K11
    plan = diff(old, new)
    left = plan.without(frozenset(names))
    found = apply(left, old)
    for name in {*old.services, *new.services}:
        assert found.services.get(name) == (old if name in names else new).services.get(name)


def test_an_empty_plan_is_false() -> None:
    assert not diff(Snapshot(), Snapshot())
    assert Plan((), ("log",), Snapshot())
