"""system/context.py: each context is entered by a forked child, which tells what it has become."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import in_child

from superd.core.capabilities import CAPABILITIES
from superd.core.messages import STAGES
from superd.core.spec import Context
from superd.system import context as module
from superd.system.context import ContextError, enter, has_capability, user_environment

NOBODY = pwd.getpwnam("nobody")
FREE_ID = 54321  # in no passwd file
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not (has_capability("CAP_SETUID") and has_capability("CAP_SETGID")),
    reason="needs root with CAP_SETUID and CAP_SETGID",
)
needs_root_rights = pytest.mark.skipif(
    os.geteuid() != 0 or not has_capability("CAP_SYS_NICE"), reason="needs root with CAP_SYS_NICE"
)


def facts() -> dict[str, Any]:
    """What the kernel says of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    umask = os.umask(0)
    os.umask(umask)
    return {
        "uid": [int(number) for number in status["Uid"].split()],
        "gid": [int(number) for number in status["Gid"].split()],
        "groups": sorted(int(number) for number in status["Groups"].split()),
        "caps": [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")],
        "no_new_privileges": status["NoNewPrivs"].strip() == "1",
        "umask": umask,
        "cwd": os.getcwd(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "cpus": sorted(os.sched_getaffinity(0)),
        "nofile": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
        "core": list(resource.getrlimit(resource.RLIMIT_CORE)),
    }


def entered(
    before: Callable[[], object] = lambda: None,
    *,
    nofile: tuple[int, int] | None = None,
    facts: Callable[[], dict[str, Any]] = facts,
    **fields: Any,
) -> dict[str, Any]:
    """The facts of a child that did `before()` and then entered Context(**fields); "error" when that was refused."""

    def child() -> dict[str, Any]:
        before()
        try:
            result = enter(Context(**fields), nofile=nofile)
        except ContextError as error:
            return {"error": [error.stage, error.errno, error.detail], "text": str(error)}
        return {**facts(), "user": [result.uid, result.gid], "environment": user_environment(result)}

    found: dict[str, Any] = in_child(child)
    return found


def refused(before: Callable[[], object] = lambda: None, **fields: Any) -> str:
    found = entered(before, **fields)
    assert "error" in found, found
    assert found["error"][0] in STAGES
    text: str = found["text"]
    return text


# Things that a machine may have done to superd before


def become_nobody(*groups: int) -> Callable[[], None]:
    def before() -> None:
        os.setgroups(groups)
        os.setresgid(NOBODY.pw_gid, NOBODY.pw_gid, NOBODY.pw_gid)
        os.setresuid(NOBODY.pw_uid, NOBODY.pw_uid, NOBODY.pw_uid)

    return before


def without(*names: str) -> Callable[[], None]:
    def before() -> None:
        effective, permitted, _ = module._get_capabilities()
        for name in names:
            lost = 1 << CAPABILITIES.index(name)
            effective, permitted = effective & ~lost, permitted & ~lost
        module._set_capabilities(effective, permitted, 0)

    return before


def system(function: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), function)


def user_namespace() -> None:
    """As `unshare --user --map-root-user`: ids 0 alone are mapped, setgroups is denied."""
    uid, gid = os.geteuid(), os.getegid()
    system("unshare", CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def no_proc() -> None:
    system("unshare", CLONE_NEWNS)
    system("mount", b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    system("mount", b"none", b"/proc", b"tmpfs", 0, None)


def in_namespaces_or_skip(before: Callable[[], None]) -> None:
    try:
        in_child(before)
    except AssertionError as error:
        pytest.skip(f"no such namespace here: {str(error).splitlines()[-1]}")


# Identity


@needs_root
def test_user_brings_gid_groups_and_names() -> None:  # E8, E22, E23
    found = entered(lambda: os.setgroups([0, 4, 42]), user="nobody")
    assert found["uid"] == [NOBODY.pw_uid] * 4
    assert found["gid"] == [NOBODY.pw_gid] * 4
    assert found["groups"] == sorted(os.getgrouplist("nobody", NOBODY.pw_gid))
    assert found["caps"] == [0, 0, 0, 0]
    assert found["no_new_privileges"]
    assert found["user"] == [NOBODY.pw_uid, NOBODY.pw_gid]
    assert found["environment"] == {
        "HOME": NOBODY.pw_dir, "USER": "nobody", "LOGNAME": "nobody", "SHELL": NOBODY.pw_shell,
    }  # fmt: skip


@needs_root
@pytest.mark.parametrize(
    "fields, gid, groups",
    [
        ({"user": "nobody", "groups": ()}, NOBODY.pw_gid, []),
        ({"user": "nobody", "groups": (4, "root", 4)}, NOBODY.pw_gid, [0, 4]),
        ({"user": "nobody", "group": 7}, 7, [7]),
        ({"user": NOBODY.pw_uid}, NOBODY.pw_gid, [NOBODY.pw_gid]),
        ({"user": FREE_ID, "group": FREE_ID}, FREE_ID, []),
        ({"group": 7}, 7, [0, 4, 42]),
        ({"group": 7, "groups": ()}, 7, []),
        ({"user": "root"}, 0, [0]),
        ({"user": 0, "groups": ()}, 0, []),
        ({"user": 2**32 - 2, "group": 2**32 - 2}, 2**32 - 2, []),
        ({}, 0, [0, 4, 42]),
    ],
)
def test_gid_and_groups(fields: dict[str, Any], gid: int, groups: list[int]) -> None:  # E8
    found = entered(lambda: os.setgroups([0, 4, 42]), **fields)
    assert found["gid"] == [gid] * 4
    assert found["groups"] == groups
    # Capabilities stay with uid 0 alone, and what it has asked for is what it gets.
    uid = found["uid"][0]
    assert found["uid"] == [uid] * 4
    assert (uid == 0) == (fields.get("user") in (None, 0, "root"))
    assert (found["caps"] == [0, 0, 0, 0]) == (uid != 0)


@needs_root
def test_uid_without_passwd_entry() -> None:
    found = entered(user=FREE_ID, group=FREE_ID)
    assert found["environment"] == {"HOME": "/"}
    assert refused(user=FREE_ID) == (
        f"group: cannot tell the group of uid {FREE_ID}, which has no passwd entry: `group` must say"
    )


@needs_root
def test_root_keeps_its_capabilities_but_inherits_none() -> None:  # E22
    def before() -> None:
        effective, permitted, _ = module._get_capabilities()
        module._set_capabilities(effective, permitted, permitted)
        system("prctl", 47, 2, 7, 0, 0)  # PR_CAP_AMBIENT_RAISE CAP_SETUID

    found = entered(before, user="root", no_new_privileges=False)
    inheritable, permitted, effective, ambient = found["caps"]
    assert inheritable == ambient == 0
    assert permitted == effective != 0
    assert not found["no_new_privileges"]


@needs_root
@pytest.mark.parametrize("user", [None, "nobody", "daemon"])
def test_unprivileged_superd_with_capabilities_passes_none_on(user: str | None) -> None:  # E22
    def before() -> None:
        setid = 1 << 6 | 1 << 7
        system("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        become_nobody()()
        module._set_capabilities(setid, setid, setid)
        system("prctl", 47, 2, 7, 0, 0)  # PR_CAP_AMBIENT_RAISE CAP_SETUID

    found = entered(before, user=user)
    assert found["uid"] == [pwd.getpwnam(user or "nobody").pw_uid] * 4
    assert found["caps"] == [0, 0, 0, 0]


@needs_root
@pytest.mark.parametrize(
    "fields", [{}, {"user": "nobody"}, {"user": NOBODY.pw_uid}, {"user": "nobody", "group": NOBODY.pw_gid}]
)
def test_who_already_is_that_user_needs_no_privilege(fields: dict[str, Any]) -> None:
    found = entered(become_nobody(4, 42), **fields)
    assert found["uid"] == [NOBODY.pw_uid] * 4
    assert found["gid"] == [NOBODY.pw_gid] * 4
    assert found["groups"] == [4, 42]
    assert found["environment"]["USER"] == "nobody"


@needs_root
def test_unknown_own_uid_keeps_its_gid() -> None:
    def before() -> None:
        os.setgroups([])
        os.setresgid(7, 7, 7)
        os.setresuid(FREE_ID, FREE_ID, FREE_ID)

    found = entered(before, user=FREE_ID)
    assert (found["uid"], found["gid"]) == ([FREE_ID] * 4, [7] * 4)
    assert found["environment"] == {"HOME": "/"}


def test_own_user_by_whoever_runs_this() -> None:
    found = entered()
    assert found["uid"] == [os.geteuid()] * 4
    assert found["user"] == [os.geteuid(), os.getegid()]
    assert found["groups"] == sorted(os.getgroups())


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"user": "0day"}, "user: cannot become '0day': no such user"),
        ({"user": "1000"}, "user: cannot become '1000': no such user"),
        ({"user": ""}, "user: cannot become '': no such user"),
        ({"user": "nobody\n"}, "user: cannot become 'nobody\\n': no such user"),
        ({"user": "no\0body"}, "user: cannot become 'no\\x00body': no such user"),
        ({"user": "\udc80"}, "user: cannot become '\\udc80': no such user"),
        ({"user": -1}, "user: cannot use id -1: ids are 0 to 4294967294"),
        ({"user": 2**32 - 1}, "user: cannot use id 4294967295: ids are 0 to 4294967294"),
        ({"user": True}, "user: cannot use id True: ids are 0 to 4294967294"),
        ({"group": "0day"}, "group: cannot join '0day': no such group"),
        ({"group": 2**32}, "group: cannot use id 4294967296: ids are 0 to 4294967294"),
        ({"groups": ("0day",)}, "groups: cannot join '0day': no such group"),
        ({"groups": (-1,)}, "groups: cannot use id -1: ids are 0 to 4294967294"),
    ],
)
def test_names_that_do_not_exist(fields: dict[str, Any], text: str) -> None:  # E10, E11
    assert refused(**fields) == text


def test_a_passwd_entry_with_uid_minus_one(monkeypatch: pytest.MonkeyPatch) -> None:  # E10
    """setresuid(-1) succeeds and changes nothing."""
    entry = pwd.struct_passwd(("trap", "x", 2**32 - 1, 7, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", lambda name: entry)
    assert refused(user="trap").startswith("user: cannot use id 4294967295")


@needs_root
@pytest.mark.parametrize(
    "capability, fields, text",
    [
        ("SETGID", {"user": "nobody"}, "groups: cannot set the groups of 'nobody'"),
        ("SETGID", {"group": 7}, "group: cannot change to gid 7"),
        ("SETUID", {"user": "nobody"}, "user: cannot become 'nobody'"),
    ],
)
def test_dropped_capability_is_named(capability: str, fields: dict[str, Any], text: str) -> None:  # E9, (e) 12
    assert refused(without(capability), **fields) == f"{text} without CAP_{capability}: operation not permitted"


@needs_root
def test_unprivileged_superd_cannot_become_another() -> None:  # E9
    assert "without CAP_SETGID: operation not permitted" in refused(become_nobody(), user="root")
    assert refused(become_nobody(), user="root", groups=(), group=NOBODY.pw_gid) == (
        "user: cannot become 'root' without CAP_SETUID: operation not permitted"
    )
    assert "CAP_SETGID" in refused(become_nobody(), groups=(4,))


def test_user_namespace_without_the_target() -> None:  # E9, (e) 11
    in_namespaces_or_skip(user_namespace)
    assert refused(user_namespace, user="nobody") == (
        "groups: cannot set the groups of 'nobody' in a user namespace that denies setgroups: operation not permitted"
    )
    assert refused(user_namespace, group=NOBODY.pw_gid) == (
        f"group: cannot change to gid {NOBODY.pw_gid}, which this user namespace does not map: invalid argument"
    )
    found = entered(user_namespace, user="root")  # its own: runs
    assert (found["uid"], found["gid"]) == ([0] * 4, [0] * 4)


@needs_root
def test_uid_that_the_namespace_does_not_map() -> None:  # E9
    def before() -> None:
        os.setgroups([])
        user_namespace()

    in_namespaces_or_skip(before)
    assert refused(before, user="nobody", group=0, groups=()) == (
        "user: cannot become 'nobody', which this user namespace does not map: invalid argument"
    )


@needs_root
@pytest.mark.parametrize("call", ["setresuid", "setresgid", "setgroups"])
def test_a_call_that_only_pretends_is_found_out(call: str, monkeypatch: pytest.MonkeyPatch) -> None:  # E8, E9
    monkeypatch.setattr(os, call, lambda *_: None)
    found = entered(user="nobody", groups=(4,), group=7)
    assert found["error"][0] == "verify"


@needs_root
def test_the_spawner_cannot_be_traced_by_its_user() -> None:
    found = entered(user="nobody", facts=lambda: {"owner": os.stat("/proc/self/fd").st_uid})
    assert found["owner"] == 0


# Limits, scores, priorities


def test_nofile_comes_back_unless_configured() -> None:  # E20
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert entered(nofile=(77, hard))["nofile"] == [77, hard]
    assert entered(nofile=(77, hard), rlimits=(("nofile", 88, hard),))["nofile"] == [88, hard]
    assert entered(nofile=(77, hard), rlimits=(("nofile", 88, 99),))["nofile"] == [88, 99]
    assert entered(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (66, hard)))["nofile"] == [66, hard]


def test_rlimits() -> None:
    def more() -> dict[str, Any]:
        return {"cpu": resource.getrlimit(resource.RLIMIT_CPU), "stack": resource.getrlimit(resource.RLIMIT_STACK)}

    found = entered(rlimits=(("cpu", 60, 3600), ("stack", 1 << 20, 1 << 20)), facts=more)
    assert found["cpu"] == [60, 3600]
    assert found["stack"] == [1 << 20, 1 << 20]
    assert entered(rlimits=(("core", 0, 0),))["core"] == [0, 0]


def lower_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (100, 100))


@pytest.mark.parametrize(
    "limit, text",
    [
        (("core", 200, 100), "limits: cannot set core to 200: the hard limit is 100"),
        (("core", -1, 100), "limits: cannot set core to -1: the hard limit is 100"),
        (("colour", 1, 1), "limits: cannot set 'colour': no such limit here"),
        (("core", 200, 300), "limits: cannot raise the hard limit of core from 100 to 300 without CAP_SYS_RESOURCE:"
                             " operation not permitted"),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_had(limit: tuple[str, int, int], text: str) -> None:
    def before() -> None:
        lower_core()
        without("SYS_RESOURCE")()

    assert refused(before, rlimits=(limit,)) == text


def test_oom_score() -> None:  # E21
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert entered()["oom"] == max(own, 0)
    higher = max(own, 0) + 100
    assert entered(oom_score_adjust=higher)["oom"] == higher
    # Whatever superd itself was given: a service gets 0 unless its file says otherwise.
    assert entered(lambda: Path("/proc/self/oom_score_adj").write_text(str(higher)))["oom"] == max(own, 0)
    assert refused(without("SYS_RESOURCE"), oom_score_adjust=-1000) == (
        "oom: cannot set oom_score_adjust to -1000 without CAP_SYS_RESOURCE: permission denied"
    )


@pytest.mark.skipif(not has_capability("CAP_SYS_RESOURCE"), reason="needs CAP_SYS_RESOURCE")
def test_services_are_not_spared_because_superd_is() -> None:  # E21
    assert entered(lambda: Path("/proc/self/oom_score_adj").write_text("-500"))["oom"] == 0


@pytest.mark.parametrize("own, wanted, result", [("-500", None, "0"), ("-500", -7, "-7"), ("0", None, "0")])
def test_oom_score_is_written_when_it_is_negative(
    own: str, wanted: int | None, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # E21
    """With a file in the place of /proc/self/oom_score_adj, since a negative score takes a privilege."""
    file = tmp_path / "score"
    file.write_text(own)
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real(file, flags | os.O_TRUNC * (flags != os.O_RDONLY)))
    module._set_oom_score_adjust(wanted)
    assert file.read_text() == result


def test_umask_is_always_set() -> None:  # E19
    assert entered(lambda: os.umask(0))["umask"] == 0o022
    assert entered(umask=0o077)["umask"] == 0o077


def test_nice_and_cpus() -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    cpus = sorted(os.sched_getaffinity(0))
    assert entered(nice=min(nice + 3, 19))["nice"] == min(nice + 3, 19)
    assert entered(cpu_affinity=(cpus[-1],))["cpus"] == [cpus[-1]]
    assert refused(cpu_affinity=(cpus[0], 8191)) == (
        f"scheduling: cannot run on cpus {cpus[0]}, 8191: not all of them are available here"
    )
    assert refused(cpu_affinity=(8191,)) == "scheduling: cannot run on cpus 8191: invalid argument"
    assert refused(without("SYS_NICE"), nice=nice - 1) == (
        f"scheduling: cannot set nice to {nice - 1} without CAP_SYS_NICE: permission denied"
    )


@needs_root_rights
def test_nice_below_superds_own_as_another_user() -> None:
    assert entered(user="nobody", nice=-5)["nice"] == -5


@pytest.mark.parametrize("ioprio, value", [("idle", 3 << 13), ("best-effort:6", 2 << 13 | 6)])
def test_ioprio(ioprio: str, value: int) -> None:
    def more() -> dict[str, Any]:
        number = {251: 252, 30: 31}[module._SYS_IOPRIO_SET.get(os.uname().machine, 30)]
        return {"ioprio": ctypes.CDLL(None).syscall(number, 1, 0)}  # ioprio_get(2)

    if module._SYS_IOPRIO_SET.get(os.uname().machine, 30) not in (251, 30):
        pytest.skip("the number of ioprio_get is not known here")
    assert entered(ioprio=ioprio, facts=more)["ioprio"] == value


@needs_root
def test_ioprio_without_privilege() -> None:
    assert refused(become_nobody(), ioprio="realtime:0") == (
        "scheduling: cannot set ioprio to 'realtime:0': operation not permitted"
    )


# Directory


@needs_root
def test_directory_is_entered_as_the_new_user(workshop: Path) -> None:  # E18
    theirs, ours = workshop / "theirs", workshop / "ours"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY.pw_uid, NOBODY.pw_gid)
    ours.mkdir(mode=0o700)
    assert entered(user="nobody", cwd=str(theirs))["cwd"] == str(theirs)
    assert refused(user="nobody", cwd=str(ours)) == f"directory: cannot enter '{ours}': permission denied"


def test_directory(tmp_path: Path) -> None:  # E18
    assert entered(lambda: os.chdir(tmp_path))["cwd"] == "/"
    assert refused(cwd=f"{tmp_path}/no") == f"directory: cannot enter '{tmp_path}/no': no such file or directory"
    text = refused(cwd="/a\0b")  # the reason is Python's
    assert re.fullmatch(r"directory: cannot enter '/a\\x00b': .*embedded null (byte|character in path)", text)


# The rest


@needs_root
def test_without_proc() -> None:  # (e) 9
    in_namespaces_or_skip(no_proc)
    found = entered(no_proc, user="nobody", facts=lambda: {"groups": os.getgroups(), "uids": os.getresuid()})
    assert found["uids"] == [NOBODY.pw_uid] * 3
    text = "oom: cannot open /proc/self/oom_score_adj: no such file or directory"
    assert refused(no_proc, oom_score_adjust=0) == text


@needs_root
def test_low_limits_do_not_stop_the_way_in() -> None:  # N7
    found = entered(
        user="nobody", rlimits=(("nofile", 3, 3), ("nproc", 0, 0), ("fsize", 0, 0), ("core", 0, 0)),
        facts=lambda: {"uids": os.getresuid()},
    )  # fmt: skip
    assert found["uids"] == [NOBODY.pw_uid] * 3


def test_memory_limit_that_leaves_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_set_scheduling", exhausted)
    assert refused() == "limits: cannot go on under these limits: cannot allocate memory"


def test_error_names_the_stage() -> None:  # F13
    error = ContextError("user", errno.EPERM, "cannot become 'www'")
    assert str(error) == "user: cannot become 'www': operation not permitted"
    assert str(ContextError("user", None, "cannot become 'www': no such user")) == (
        "user: cannot become 'www': no such user"
    )


def test_has_capability_is_what_proc_says() -> None:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    effective = int(line.split()[1], 16)
    for number, name in enumerate(CAPABILITIES):
        assert has_capability("CAP_" + name) == bool(effective >> number & 1)
    with pytest.raises(ValueError):
        has_capability("CAP_FLY")


def test_imports_are_light() -> None:
    """The keeper lives in some 10 MB: neither dataclasses nor typing by way of these two."""
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); import superd.system.context, superd.system.process\n"
        "print(sorted({'typing', 'dataclasses', 'inspect', 're', 'subprocess', 'ctypes'} & set(sys.modules)))"
    )  # -S: how superd is installed may need some of them
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, text=True).stdout == "[]\n"
