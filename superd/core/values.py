"""The small languages inside strings: durations, sizes, modes, rates, signals, commands, `${…}`.

Each parse_x takes what TOML gives and raises ValueError with the right form in the message; format_x writes the
shortest text that parse_x reads back as the same value. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping

from superd.core.spec import CpuTime, RateSpec

LONGEST_S = 10 * 365 * 86400  # a deadline further away is a mistake, and a float of seconds still counts microseconds

_UNITS_US = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000, "ms": 1000, "us": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,12}}(?:\.[0-9]{{1,6}})?){unit})?" for unit in _UNITS_US), re.ASCII)
_SIZE = re.compile(r"([0-9]{1,16})([KMGT]?)(?:iB)?", re.ASCII)
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def quote(value: object) -> str:
    """`value` as a message shows it: in quotes if a string, as TOML writes it, never longer than a line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:60]}…{text[0]} ({len(value)} characters)"
    if isinstance(value, int | float):
        # int() of more than 4300 digits, and str() of it, are a ValueError of their own
        return str(value) if isinstance(value, float) or value.bit_length() < 256 else "a number of more than 256 bits"
    if isinstance(value, list):
        return "a list"
    return "a table" if isinstance(value, dict) else f"a {type(value).__name__}"


def parse_duration(value: object) -> float:
    """Seconds of "1h30m". Units in descending order, each once: d h m s ms us."""
    right = 'write a number and its unit, as in "500ms", "30s", "1h30m", "2d"'
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LONGEST_S:
        raise ValueError(f'{value} has no unit: write "{value}s" (or "500ms", "1h30m", "2d")')
    if not isinstance(value, str):
        raise ValueError(f"{quote(value)} is not a duration: {right}")
    match = _DURATION.fullmatch(value)
    if match is None or not value:
        compact = value.replace(" ", "").lower()
        for long, short in (("milliseconds", "ms"), ("seconds", "s"), ("sec", "s"), ("minutes", "m"), ("min", "m")):
            compact = compact.replace(long, short)
        if compact.isascii() and compact.isdigit():
            compact += "s"
        if compact and compact != value and _DURATION.fullmatch(compact):
            right = f'write "{compact}"'
        raise ValueError(f"{quote(value)} is not a duration: {right}")
    micros = 0
    for number, unit in zip(match.groups(), _UNITS_US.values(), strict=True):
        if number is not None:
            whole, _, fraction = number.partition(".")
            micros += int(whole) * unit + int(fraction.ljust(6, "0")) * unit // 1_000_000
    if micros > LONGEST_S * 1_000_000:
        raise ValueError(f'{quote(value)} is too long: the longest duration is "3650d"')
    return micros / 1_000_000


def format_duration(seconds: float) -> str:
    """ "1h30m" of 5400.0."""
    left = round(seconds * 1_000_000)
    text = ""
    for unit, size in _UNITS_US.items():
        count, left = divmod(left, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_size(value: object) -> int:
    """Bytes of "64M", "64MiB" or 65536."""
    right = 'write bytes, or "64K", "64M", "2G", "1T" (powers of 1024)'
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or not isinstance(value, str) or not match[2]:
        text = value if isinstance(value, str) else ""
        if close := re.fullmatch(r"\s*([0-9]{1,16})\s*([kmgt]?)i?b?\s*", text, re.I | re.A):
            right = f'write "{close[1]}{close[2].upper()}" (a power of 1024)' if close[2] else f"write {close[1]}"
        raise ValueError(f"{quote(value)} is not a size: {right}")
    size = int(match[1]) * _SIZES[match[2]]
    if size >= 1 << 63:
        raise ValueError(f"{quote(value)} is too large: a size is less than 8388608T")
    return size


def format_size(size: int) -> str:
    """ "64M" of 67108864; plain bytes where no unit divides them."""
    for unit, factor in reversed(_SIZES.items()):
        if size and size % factor == 0 and unit:
            return f"{size // factor}{unit}"
    return str(size)


def parse_cpu_time(value: object) -> CpuTime:
    """Of "50%" (of one CPU; "200%" is two), or of the kernel's own "50000 100000": microseconds, and in how many."""
    right = 'write "50%" of one CPU, or microseconds and in how many as the kernel has it, "50000 100000"'
    text = value if isinstance(value, str) else ""
    if found := re.fullmatch(r"([0-9]{1,7})(?:\.([0-9]{1,3}))?%", text, re.A):
        quota = int(found[1]) * 1000 + int((found[2] or "").ljust(3, "0"))
        # A group gets no less than a millisecond at a time.
        time = CpuTime(quota, _PERIOD) if quota >= _CPU_LEAST else CpuTime(quota * 10, _PERIOD * 10)
    elif found := re.fullmatch(r"([0-9]{1,12}) ([0-9]{1,12})", text, re.A):
        time = CpuTime(int(found[1]), int(found[2]))
    else:
        raise ValueError(f"{quote(value)} is no CPU time: {right}")
    if time.quota < _CPU_LEAST:
        raise ValueError(f'{quote(value)} is too small: the kernel grants no less than "1000 1000000", 0.1%')
    if not _CPU_LEAST <= time.period <= 1_000_000:
        raise ValueError(f"{quote(value)}: the second number is 1000 to 1000000 microseconds")
    return time


def format_cpu_time(time: CpuTime) -> str:
    """ "50%" where it could have been written so, else the kernel's form."""
    for factor in (1, 10):
        quota = time.quota // factor
        could_be = quota < 10**10 and (quota >= _CPU_LEAST) == (factor == 1)
        if could_be and time == CpuTime(quota * factor, _PERIOD * factor):
            return f"{quota // 1000}.{quota % 1000:03d}".rstrip("0").rstrip(".") + "%"
    return str(time)


_PERIOD, _CPU_LEAST = 100_000, 1000  # microseconds; the period is the kernel's own default


def parse_mode(value: object) -> int:
    """The permission bits of "0660"."""
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}|[0-7]{4}", value, re.A):
        return int(value, 8)
    if isinstance(value, int) and not isinstance(value, bool):
        guesses = [f"{value:04o}"] if 0 < value <= 0o777 else []
        if 0 < value <= 7777 and re.fullmatch(r"[0-7]+", str(value)):
            guesses.insert(0, f"{value:04d}")
        right = " or ".join(f'"{guess}"' for guess in guesses) or '"0660"'
        raise ValueError(f"{quote(value)} is not a mode: write the string {right} (TOML cannot tell 400 from 0o400)")
    raise ValueError(f'{quote(value)} is not a mode: write three or four octal digits, as in "0660"')


def format_mode(mode: int) -> str:
    """ "0660" of 0o660."""
    return f"{mode:04o}"


def parse_rate(value: object) -> RateSpec:
    """`count` in any window of `per_s` seconds, of "50/1s"."""
    right = 'write a count and a window, as in "50/1s" or "10/1m"'
    if not isinstance(value, str):
        number = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9
        raise ValueError(f"{quote(value)} is not a rate: " + (f'write "{value}/1s"' if number else right))
    count, slash, window = value.partition("/")
    if not slash or not re.fullmatch(r"[0-9]{1,9}", count, re.A):
        near = re.fullmatch(r"[1-9][0-9]{0,8}", value, re.A)
        raise ValueError(f"{quote(value)} is not a rate: " + (f'write "{value}/1s" or "{value}/1m"' if near else right))
    if window in _UNITS_US:
        raise ValueError(f'{quote(value)} is not a rate: write "{count}/1{window}"')
    try:
        per_s = parse_duration(window)
    except ValueError as error:
        raise ValueError(f"{quote(value)} is not a rate: {error}") from None
    if int(count) == 0 or per_s == 0:
        raise ValueError(f'{quote(value)} would let nothing pass: write "off" for no limit, {right[6:]}')
    return RateSpec(int(count), per_s)


def format_rate(rate: RateSpec) -> str:
    """ "50/1s"."""
    return f"{rate.count}/{format_duration(rate.per_s)}"


def parse_signal(value: object) -> int:
    """The number of "TERM" or "SIGTERM"; "RTMIN+3" works too. Numbers differ between machines and are refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            raise ValueError(f'{quote(value)} is a number: write the name of the signal, "{format_signal(value)}"')
        except OverflowError:
            pass
    if isinstance(value, str):
        name = value.removeprefix("SIG")
        if match := re.fullmatch(r"(RTMIN|RTMAX)(?:([+-])([0-9]{1,2}))?", name, re.A):
            base = signal.SIGRTMIN if match[1] == "RTMIN" else signal.SIGRTMAX
            number = base + int(f"{match[2] or '+'}{match[3] or 0}")
            if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
                return int(number)
        elif name in _SIGNALS:
            return _SIGNALS[name]
        if (upper := name.upper().removeprefix("SIG")) in _SIGNALS:
            raise ValueError(f'{quote(value)} is not a signal: write "{upper}"')
    raise ValueError(f'{quote(value)} is not a signal: write its name, as in "TERM", "INT", "USR1", "RTMIN+3"')


_SIGNALS = {s.name[3:]: int(s) for s in signal.Signals if not s.name.startswith("SIGRT")} | {"CLD": signal.SIGCHLD}


def format_signal(number: int) -> str:
    """ "TERM" of 15; real-time signals as RTMIN+N; a number where there is no such signal."""
    if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
        return f"RTMIN+{number - signal.SIGRTMIN}"
    try:
        return signal.Signals(number).name[3:]
    except ValueError:
        return str(number)


_PLAIN = re.compile(r"[A-Za-z0-9_./:,=@%+ \t\n-]*", re.A)  # nothing that means more to a shell than to split()
_NEED_SHELL = {
    "|": "a pipe", ">": "a redirection", "<": "a redirection", "&": "`&`", ";": "`;`", "(": "a subshell",
    ")": "a subshell", "`": "a command substitution",
}  # fmt: skip


def split_command(text: str) -> list[str]:
    """The words of a command line, split and unquoted as a POSIX shell does it (XCU 2.2), without its other work.

    `${NAME}` stays in its word, whatever it will expand to. Where a shell would do more than split (pipes,
    redirections, substitutions), ValueError: no shell is started.
    """
    if _PLAIN.fullmatch(text):
        return text.split()
    words: list[str] = []
    word: list[str] | None = None
    position = 0
    while position < len(text):
        char = text[position]
        position += 1
        if char in " \t\n":
            if word is not None:
                words.append("".join(word))
            word = None
            continue
        if char in _NEED_SHELL:
            raise ValueError(_no_shell(text, _NEED_SHELL[char]))
        if text.startswith("$(", position - 1):
            raise ValueError(_no_shell(text, "a command substitution"))
        word = [] if word is None else word
        if char == "\\":
            if position == len(text):
                raise ValueError(f"cannot split command {quote(text)}: it ends in a backslash")
            word.append("" if text[position] == "\n" else text[position])
            position += 1
        elif char == "'":
            end = text.find("'", position)
            if end < 0:
                raise ValueError(f"cannot split command {quote(text)}: no closing quotation mark (')")
            word.append(text[position:end])
            position = end + 1
        elif char == '"':
            position = _double_quoted(text, position, word)
        elif match := _EXPANSION.match(text, position - 1):
            word.append(match[0])
            position = match.end()
        else:
            word.append(char)
    return words if word is None else [*words, "".join(word)]


def _double_quoted(text: str, position: int, word: list[str]) -> int:
    """Append what stands between the double quotes; where to go on."""
    while position < len(text):
        char = text[position]
        if char == '"':
            return position + 1
        if char == "`" or text.startswith("$(", position):
            raise ValueError(_no_shell(text, "a command substitution"))
        if char == "\\" and text[position + 1 : position + 2] in ("$", "`", '"', "\\", "\n"):
            word.append(text[position + 1].replace("\n", ""))
            position += 2
        elif match := _EXPANSION.match(text, position):
            word.append(match[0])
            position = match.end()
        else:
            word.append(char)
            position += 1
    raise ValueError(f'cannot split command {quote(text)}: no closing quotation mark (")')


def _no_shell(text: str, what: str) -> str:
    line = text if len(text) < 200 else "…"
    escaped = line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'no shell is started, and {what} needs one: write ["/bin/sh", "-c", "{escaped}"]'


# `$${` | `${what}`: all the language there is.
_EXPANSION = re.compile(r"\$\$\{|\$\{([^}\n]*)\}")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.S)
_RUNTIME = re.compile(r"port|port:.+|fd:.+", re.S)


def expand(
    text: str, own: Mapping[str, str], environ: Mapping[str, str], *, runtime: Callable[[str], None] | None = None
) -> str:
    """`text` with `${NAME}` and `${NAME:-default}` filled in from `own` (name, instance), then from `environ`.

    With `runtime`, what only run time knows stays in the result, for expand_runtime: `${port}`, `${port:S}`,
    `${fd:S}` (each first shown to `runtime`, which raises ValueError when there is no such thing) and `$${`.
    """

    def fill(match: re.Match[str]) -> str:
        what = match[1]
        if what is None:
            return "${" if runtime is None else "$${"
        if _RUNTIME.fullmatch(what) and ":-" not in what:
            if runtime is None:
                raise ValueError(f"${{{what}}} is known only at run time: it is for command and environment")
            runtime(what)
            return match[0]
        variable = _VARIABLE.fullmatch(what)
        if variable is None:
            raise ValueError(f"cannot expand ${{{what}}}: write ${{NAME}}, or $${{ for a literal ${{")
        name, default = variable.groups()
        value = own.get(name, environ.get(name, ""))
        if not value and default is not None:
            value = default
        elif name not in own and name not in environ:
            hint = f"write ${{{name}:-default}} if that may be"
            hint = "only a template (NAME@.toml) has one" if name == "instance" else hint
            raise ValueError(f"${{{name}}} is not set: {hint}")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(f"cannot expand ${{{name}}}: its value is not UTF-8")
        # A dollar that comes from outside must not begin anything at run time. `${$}` cannot be written in a file.
        return value if runtime is None else value.replace("$", "${$}")

    found = _EXPANSION.sub(fill, text)
    if "${" in _EXPANSION.sub("", text):
        raise ValueError(f"{quote(text)} has ${{ without }}: write $${{ for a literal ${{")
    return found


def expand_runtime(text: str, ports: Mapping[str, int], fds: Mapping[str, int]) -> str:
    """`text` of a command or environment with `${port}`, `${port:S}`, `${fd:S}` filled in and `$${` unescaped.

    ports   bound port by socket name, in the order of the sockets: `${port}` is the first
    fds     fd number in the service, by socket name (LISTEN_FDNAMES)

    Raises KeyError for a name that is not there; the loader has checked that each will be.
    """

    def fill(match: re.Match[str]) -> str:
        what: str | None = match[1]
        if what is None:
            return "${"
        if what == "$":
            return "$"
        if what == "port":
            for port in ports.values():
                return str(port)
            raise KeyError(what)
        kind, _, name = what.partition(":")
        return str({"port": ports, "fd": fds}[kind][name])

    return _EXPANSION.sub(fill, text)
