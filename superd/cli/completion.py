"""Completion scripts for shells, made from the table of commands.

The scripts know commands and options; names of services they ask superd for, with `superctl list --names`.
"""

from __future__ import annotations

import shlex

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping

SHELLS = ("bash", "zsh", "fish")


class Option:
    """choices: () for none; value: "" if it takes none, else what it is called."""

    def __init__(self, flags: tuple[str, ...], help: str, value: str, choices: tuple[str, ...]) -> None:
        self.flags, self.help, self.value, self.choices = flags, help, value, choices

    @property
    def takes_path(self) -> bool:
        return self.value in ("SOCKET", "DIR", "FILE")


class Command:
    """takes: what its arguments are: "names" of services, "paths", or one of some words."""

    def __init__(self, help: str, options: list[Option], takes: str | tuple[str, ...] = "") -> None:
        self.help, self.options, self.takes = help, options, takes


def command_of(parser: argparse.ArgumentParser, help: str) -> Command:
    """What a parser of argparse takes."""
    options, takes = [], ""
    for action in parser._actions:  # there is no public way
        if action.option_strings:
            value = "" if action.nargs == 0 else str(action.metavar or action.dest).upper()
            choices = tuple(map(str, action.choices or ()))
            options.append(Option(tuple(action.option_strings), action.help or "", value, choices))
        elif action.metavar == "NAME":
            takes = takes or "names"
        elif action.metavar in ("PATH", "FILE"):
            takes = "paths"
    return Command(help, options, takes)


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """shell: one of SHELLS."""
    lines = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)
    return "\n".join(lines) + "\n"


_BASH_HEAD = r"""# bash completion for superctl(1); made by `superctl completion bash`
_superctl_names() { superctl "$@" list --names 2>/dev/null; }
_superctl() {
    local line=${COMP_LINE:0:COMP_POINT} command= socket=() words= i
    local cur=${line##*[[:space:]]} prev=${COMP_WORDS[COMP_CWORD-1]}
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            -s|--socket) [[ $command == kill ]] || socket=(-s "${COMP_WORDS[i+1]}"); ((i++)) ;;
            -c|--config|--timeout) ((i++)) ;;
            -*) ;;
            *) command=${command:-${COMP_WORDS[i]}} ;;
        esac
    done
    COMPREPLY=()
    case "$command $prev" in"""

_BASH_TAIL = r"""    esac
    [[ $cur == -* ]] && words=$options
    if [[ $words == NAMES ]]; then words=$(_superctl_names "${socket[@]}"); fi
    if [[ $words == PATHS ]]; then compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return; fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    # bash takes a word apart at each @; what stands before it is there already.
    if [[ $cur == *@* && $COMP_WORDBREAKS == *@* ]]; then COMPREPLY=("${COMPREPLY[@]#"${cur%@*}@"}"); fi
}
complete -F _superctl superctl"""


def _bash(commands: Mapping[str, Command]) -> Iterator[str]:
    yield _BASH_HEAD
    options = [option for _, option in _all(commands)]
    yield (
        f"        {_after(option for option in options if option.takes_path)}) compopt -o filenames; "
        'COMPREPLY=($(compgen -f -- "$cur")); return ;;'
    )
    yield '        "kill -s") COMPREPLY=($(compgen -W "$(compgen -A signal | sed s/^SIG//)" -- "$cur")); return ;;'
    yield '        *" -s") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;'
    for name, option in _all(commands):
        for flag in option.flags if option.choices else ():
            yield f'        "{name} {flag}") words={shlex.quote(" ".join(option.choices))} ;;'
    free = (option for option in options if option.value and not option.takes_path and not option.choices)
    yield f"        {_after(free)}) return ;;"
    yield "    esac"
    yield "    local options="
    yield '    [[ -n $words ]] || case "$command" in'
    every = _flags(commands["list"].options)
    yield f"        '') words={shlex.quote(' '.join(commands))} options={shlex.quote(every)} ;;"
    for name, command in commands.items():
        takes = command.takes if isinstance(command.takes, str) else " ".join(command.takes)
        words = takes.upper() if isinstance(command.takes, str) else takes
        yield f"        {name}) words={shlex.quote(words)} options={shlex.quote(_flags(command.options))} ;;"
    yield _BASH_TAIL


def _after(options: Iterable[Option]) -> str:
    """A pattern: the word before is one of these options. -s means two things and has rules of its own."""
    flags = {flag for option in options for flag in option.flags} - {"-s"}
    return "|".join(f'*" {flag}"' for flag in sorted(flags))


def _all(commands: Mapping[str, Command]) -> Iterator[tuple[str, Option]]:
    for name, command in commands.items():
        for option in command.options:
            yield name, option


def _flags(options: Iterable[Option]) -> str:
    return " ".join(flag for option in options for flag in option.flags)


def _zsh(commands: Mapping[str, Command]) -> Iterator[str]:
    yield "#compdef superctl"
    yield "# made by `superctl completion zsh`"
    yield '_superctl_names() { local -a names; names=(${(f)"$(superctl list --names 2>/dev/null)"}); compadd -a names }'
    yield "_superctl() {"
    yield "    local curcontext=$curcontext state line; local -a commands"
    yield "    commands=("
    for name, command in commands.items():
        yield f"        {shlex.quote(f'{name}:{command.help}')}"
    yield "    )"
    yield "    _arguments -C \\"
    for option in commands["list"].options:
        if option.flags[0] != "--sockets":
            yield f"        {_zsh_option(option)} \\"
    yield "        '1: :->command' '*:: :->rest'"
    yield "    case $state in"
    yield "        command) _describe command commands ;;"
    yield "        rest) case $words[1] in"
    for name, command in commands.items():
        rest = {"names": "'*: :_superctl_names'", "paths": "'*: :_files'", "": ""}.get(
            command.takes if isinstance(command.takes, str) else "", ""
        )
        if isinstance(command.takes, tuple):
            rest = shlex.quote(f"1: :({' '.join(command.takes)})")
        options = " ".join(_zsh_option(option) for option in command.options)
        yield f"            {name}) _arguments {options} {rest} ;;"
    yield "        esac ;;"
    yield "    esac"
    yield "}"
    yield 'if [ "$funcstack[1]" = _superctl ]; then _superctl "$@"; else compdef _superctl superctl; fi'


def _zsh_option(option: Option) -> str:
    help = option.help.replace("[", "(").replace("]", ")").replace(":", ";")
    value = ""
    if option.choices:
        value = f":{option.value}:({' '.join(option.choices)})"
    elif option.value:
        value = f":{option.value}:{'_files' if option.takes_path else ''}"
    return " ".join(shlex.quote(f"({' '.join(option.flags)}){flag}[{help}]{value}") for flag in option.flags)


def _fish(commands: Mapping[str, Command]) -> Iterator[str]:
    yield "# made by `superctl completion fish`"
    yield "complete -c superctl -f"
    for name, command in commands.items():
        yield f"complete -c superctl -n __fish_use_subcommand -a {name} -d {_fish_quote(command.help)}"
    naming = [name for name, command in commands.items() if command.takes == "names"]
    yield (
        f"complete -c superctl -n '__fish_seen_subcommand_from {' '.join(naming)}' "
        "-a '(superctl list --names 2>/dev/null)'"
    )
    for name, command in commands.items():
        where = f"complete -c superctl -n '__fish_seen_subcommand_from {name}'"
        if command.takes == "paths":
            yield f"{where} -F"
        elif isinstance(command.takes, tuple):
            yield f"{where} -a {_fish_quote(' '.join(command.takes))}"
        for option in command.options:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            value = " -r -F" if option.takes_path else " -x" if option.value else ""
            choices = f" -a {_fish_quote(' '.join(option.choices))}" if option.choices else ""
            yield f"{where} {flags}{value}{choices} -d {_fish_quote(option.help)}"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
