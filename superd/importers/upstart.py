"""upstart jobs -> services. `start on socket` is a listener that the program finds through UPSTART_FDS."""

from __future__ import annotations

import posixpath
import re
import shlex
from dataclasses import dataclass

from superd.core.keys import BY_TABLE
from superd.core.values import format_duration, parse_signal
from superd.importers.draft import (
    Draft,
    FormatError,
    Job,
    Place,
    as_user,
    ip_listen,
    listen,
    literal,
    octal,
    runs_as_root,
    service_name,
)

# init/job_process.c: a command line with one of these is given to a shell.
_SHELL_CHARACTERS = re.compile(r"[~`!$^&*()=|\\{}\[\];\"'<>?]")
_PROCESSES = {"pre-start": "start_pre", "post-start": "start_post", "pre-stop": "", "post-stop": "stop_post"}
_SILENT = {"description", "author", "version", "usage", "emits", "stop", "manual", "export", "debug"}


@dataclass(slots=True)
class Stanza:
    """One statement. words: unquoted; body: the lines of a script."""

    place: Place
    words: list[str]
    text: str  # behind the first word, quotes and all
    body: str = ""


def looks_like(text: str) -> bool:
    return bool(
        re.search(r"^(start|stop)\s+on\s+\S", text, re.M)
        or re.search(r"^(respawn|expect\s+(fork|daemon|stop)|setuid\s+\S+|console\s+(log|output|none))\s*$", text, re.M)
    ) and bool(re.search(r"^(exec\s+\S|script\s*$|(pre|post)-st(art|op)\s)", text, re.M))


def read(path: str, text: str, job: Job) -> list[Draft]:
    stanzas = list(_stanzas(path, text))
    override = re.sub(r"\.conf$", "", path) + ".override"
    for found in job.files.glob(override):
        try:
            stanzas += _stanzas(found, job.files.read(found))
        except OSError as error:
            job.say(Place(found, 0), "warning", f"not carried over: cannot read it: {error.strerror}")
    draft = Draft(service_name(posixpath.basename(path).removesuffix(".conf")), Place(path, 0))
    if _fill(draft, stanzas):
        return [draft]
    job.notes += draft.notes
    return []


def _stanzas(path: str, text: str) -> list[Stanza]:
    found: list[Stanza] = []
    lines = text.replace("\r\n", "\n").split("\n")
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        # A backslash, or an open parenthesis of `start on`, takes in the next line.
        while at < len(lines) and (line.endswith("\\") or (line.startswith(("start", "stop")) and _depth(line) > 0)):
            line = f"{line.removesuffix(chr(92)).rstrip()} {lines[at].strip()}"
            at += 1
        place = Place(path, number)
        words = _words(line, place) if line.strip() else []
        if not words:
            continue
        stanza = Stanza(place, words, line.partition(" ")[2].strip())
        if words[-1] == "script" and (len(words) == 1 or words[0] in _PROCESSES):
            body = []
            while at < len(lines) and lines[at].strip() != "end script":
                body.append(lines[at])
                at += 1
            if at == len(lines):
                raise FormatError(place, "`script` without `end script`")
            at += 1
            stanza.body = "\n".join(body) + "\n"
        found.append(stanza)
    return found


def _depth(line: str) -> int:
    plain = re.sub(r"\"[^\"]*\"|#.*", "", line)
    return plain.count("(") - plain.count(")")


def _words(line: str, place: Place) -> list[str]:
    """Split at blanks, quotes removed. An exec or env line may have quotes of the shell's: they are not looked at."""
    first = line.split(None, 1)[0]
    if first in ("exec", "env") or first in _PROCESSES:
        return line.split()
    lexer = shlex.shlex(line, posix=True, punctuation_chars="()")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        return list(lexer)
    except ValueError:
        raise FormatError(place, f"no closing quotation mark in {line[:60]!r}") from None


def _fill(draft: Draft, stanzas: list[Stanza]) -> bool:
    last = {(s.words[0], s.words[1] if s.words[0] in ("kill", "normal", "oom", "limit", "respawn") and len(s.words) > 1
             else ""): s for s in stanzas}  # fmt: skip
    manual = any(s.words[0] == "manual" for s in stanzas)
    starts = [s for s in stanzas if s.words[:2] == ["start", "on"]]
    if starts:
        _start_on(draft, starts[-1])
    if not _program(draft, stanzas):
        return False
    if draft.sockets:
        draft.set("run", "on-demand", starts[-1].place)
        draft.set("fd_protocols", ["upstart"], starts[-1].place)
    elif ("task", "") in last:
        draft.set("run", "once", last["task", ""].place)
    if manual or not starts:
        draft.set("enabled", False)
        draft.say("note", "nothing starts it: enabled = false; `superctl start` does")
    if ("setuid", "") not in last:
        runs_as_root(draft, draft.place, "there is no setuid")
    if ("respawn", "") not in last and not any(key == "respawn" for key, _ in last):
        if draft.run == "always-on":
            draft.set("restart", "no")
    elif "restart" not in draft.values:
        draft.set("restart", "always")
    for stanza in last.values():
        _stanza(draft, stanza)
    environment = {}
    for stanza in stanzas:
        if stanza.words[0] == "env":
            name, equals, value = stanza.text.partition("=")
            value = _unquote(value.strip())
            if not equals:
                draft.lost(f"env {stanza.text}: the variable of whoever started the job", stanza.place)
            elif not name.strip().isidentifier() or name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_")):
                draft.lost(f"env {stanza.text}", stanza.place)
            else:
                environment[name.strip()] = literal(value)
                draft.where["environment"] = stanza.place
    if environment:
        draft.set("environment", environment, draft.where["environment"])
    return True


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _start_on(draft: Draft, stanza: Stanza) -> None:
    """The `socket` events; the others start nothing here, but a job with none but others runs from the start."""
    events: list[list[str]] = []
    for word in stanza.words[2:]:
        if word in ("and", "or") or set(word) <= {"(", ")"}:
            events.append([])
        elif not events:
            events.append([word])
        else:
            events[-1].append(word)
    others = []
    for event in filter(None, events):
        if event[0] != "socket":
            others.append(" ".join(event))
            continue
        facts = dict(word.partition("=")[::2] for word in event[1:])
        protocol = facts.get("PROTO", "")
        if protocol in ("inet", "inet6") and facts.get("PORT"):
            version = "6" if protocol == "inet6" else "4"
            host = facts.get("ADDR", "")
            address = ip_listen("tcp", host, facts["PORT"], version)
            # A numeric address tells its version itself.
            listen(draft, address, stanza.place)
        elif protocol == "unix" and (path := facts.get("SOCKET_PATH") or facts.get("PATH")):
            listen(draft, f"unix:{literal(path)}", stanza.place)
        else:
            draft.lost(f"{' '.join(event)}: PROTO is inet or inet6 with PORT, or unix with SOCKET_PATH", stanza.place)
    if others and draft.sockets:
        draft.lost(f"start on {', '.join(others)}: traffic starts it, or `superctl start`", stanza.place)
    elif others:
        draft.say("note", f"start on {', '.join(others)}: it runs from the start of superd", stanza.place)


def _program(draft: Draft, stanzas: list[Stanza]) -> bool:
    main = [s for s in stanzas if s.words[0] in ("exec", "script")]
    if not main:
        draft.lost("there is neither exec nor script: superd runs nothing else")
        return False
    if (command := _command(main[-1], main[-1].text)) is None:
        draft.lost("exec without a command", main[-1].place)
        return False
    draft.set("command", command, main[-1].place)
    for stanza in stanzas:
        into = _PROCESSES.get(stanza.words[0])
        if into is None:
            continue
        kind, _, text = stanza.text.partition(" ")
        command = _command(stanza, text.strip()) if kind in ("exec", "script") else None
        if not into or command is None:
            draft.lost(f"{stanza.words[0]} {kind}", stanza.place)
        else:
            draft.set(into, [command], stanza.place)
    return True


def _command(stanza: Stanza, text: str) -> list[str] | None:
    if stanza.body:
        return ["/bin/sh", "-e", "-c", literal(stanza.body)]
    if not text:
        return None
    if _SHELL_CHARACTERS.search(text):
        return ["/bin/sh", "-e", "-c", literal(f"exec {text}")]
    return [literal(word) for word in text.split()]


def _stanza(draft: Draft, stanza: Stanza) -> None:
    word, rest, place = stanza.words[0], stanza.words[1:], stanza.place
    text = " ".join(rest)
    said = f"{word} {text}".strip()
    if word in ("exec", "script", "env", "start", "task", *_PROCESSES):
        return
    if word == "description" and rest:
        draft.set("description", "".join(char for char in rest[0] if char.isprintable()), place)
    elif word in ("setuid", "setgid") and rest:
        as_user(draft, rest[0], place, key="user" if word == "setuid" else "group")
    elif word == "chdir" and rest and rest[0].startswith("/"):
        draft.set("cwd", literal(rest[0]), place)
    elif word == "chroot" and rest:
        draft.set("sandbox.chroot", literal(rest[0]), place)
    elif word == "umask" and (mask := octal(text)) is not None:
        draft.set("umask", mask, place)
    elif word == "nice" and _integer(text, -20, 19):
        draft.set("scheduling.nice", int(text), place)
    elif word == "oom" and rest:
        score = {"never": "-1000"}.get(rest[-1], rest[-1])
        if rest[0] == "score" and _integer(score, -1000, 1000):
            draft.set("scheduling.oom_score_adjust", int(score), place)
        elif rest[0] != "score" and _integer(score, -17, 15):  # the scale of the old oom_adj
            draft.set("scheduling.oom_score_adjust", -1000 if score == "-17" else int(score) * 1000 // 17, place)
        else:
            draft.lost(said, place)
    elif word == "limit" and len(rest) == 3 and rest[0] in BY_TABLE["rlimit"]:
        values = [None if v == "unlimited" else int(v) if _integer(v, 0, 2**63 - 1) else -1 for v in rest[1:]]
        if -1 in values:
            draft.lost(said, place)
        else:
            draft.set(f"rlimit.{rest[0]}", ["off" if v is None else v for v in values], place)
    elif word == "console" and rest:
        if rest[0] == "none":
            draft.set("stdout", "null", place)
            draft.set("stderr", "null", place)
        elif rest[0] in ("output", "owner"):
            draft.set("stdout", "inherit", place)
            draft.set("stderr", "inherit", place)
        elif rest[0] != "log":
            draft.lost(said, place)
    elif word in ("kill", "reload") and len(rest) == 2 and rest[0] in ("timeout", "signal"):
        _kill(draft, word, rest, place)
    elif word == "respawn":
        if rest[:1] == ["limit"] and rest[1:] != ["unlimited"]:
            if len(rest) == 3 and _integer(rest[1], 1, 10**9) and _integer(rest[2], 1, 10**7):
                draft.set("restart_limit", f"{rest[1]}/{format_duration(int(rest[2]))}", place)
            else:
                draft.lost(said, place)
    elif word == "normal" and rest[:1] == ["exit"]:
        _normal_exit(draft, rest[1:], place)
    elif word == "expect":
        if rest == ["none"]:
            return
        draft.lost(f"{said}: superd runs programs in the foreground; look for an option that keeps it there", place)
    elif word == "instance":
        draft.lost(f"{said}: a template of superd has its instances from a list (NAME@.toml, `instances`)", place)
    elif word in ("apparmor", "cgroup"):
        draft.unprotected(said, place)
    elif word not in _SILENT:
        draft.lost(said, place)


def _kill(draft: Draft, word: str, rest: list[str], place: Place) -> None:
    if rest[0] == "timeout" and _integer(rest[1], 1, 10**7):
        draft.set("stop_timeout", format_duration(int(rest[1])), place)
        return
    name = rest[1].removeprefix("SIG")
    try:
        parse_signal(name)
    except ValueError:
        draft.lost(f"{word} {' '.join(rest)}", place)
        return
    draft.set("stop_signal" if word == "kill" else "reload_signal", name, place)


def _normal_exit(draft: Draft, codes: list[str], place: Place) -> None:
    """Ends that `respawn` does not answer."""
    found: list[int | str] = []
    for code in codes:
        if _integer(code, 0, 255):
            found.append(int(code))
        else:
            try:
                parse_signal(code)
                found.append(code.removeprefix("SIG"))
            except ValueError:
                draft.lost(f"normal exit {code}", place)
    draft.set("success_status", found, place)
    if draft.values.get("restart") == "always":
        draft.set("restart", "on-failure", place)


def _integer(text: str, low: int, high: int) -> bool:
    return bool(re.fullmatch(r"[+-]?[0-9]{1,19}", text, re.A)) and low <= int(text) <= high
