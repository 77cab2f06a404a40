"""Bash completion for `mova`: programs, their keys, choices of groups, true and false, otherwise files.

All words are in the script itself, so that a TAB starts no Python; after an update it has to be regenerated.
"""

from __future__ import annotations

from collections.abc import Mapping

import hydra

from core.compose import PACKAGE, choices_by_group
from core.keys import walk
from core.program import Command

SCRIPT = """\
# Written by `mova completion bash`.
_mova() {
    local line="${COMP_LINE:0:COMP_POINT}" word="" program="" words=""
    [[ $line == *[[:space:]] ]] || word="${line##*[[:space:]]}"
    local -a typed
    read -ra typed <<< "${line%"$word"}"
    program="${typed[1]:-}"
    [[ $program == bench ]] && program="bench${typed[2]:+ ${typed[2]}}"
    case "$program" in
@CASES@
    esac
    local -a found
    mapfile -t found < <(compgen -W "$words" -- "$word")
    if (( ${#found[@]} == 0 )); then
        local path="${word#*=}" head=""
        [[ $word == *=* ]] && head="${word%%=*}="
        mapfile -t found < <(compgen -f -- "$path")
        local one
        for one in "${!found[@]}"; do
            [[ -d ${found[one]} ]] && found[one]+=/
            found[one]="$head${found[one]}"
        done
    fi
    # Readline replaces what follows the last of its word breaks alone.
    local cut=""
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && cut="${word%"${word##*=}"}"
    COMPREPLY=("${found[@]#"$cut"}")
    [[ ${#found[@]} == 1 && ${found[0]} != *[=/.] ]] || compopt -o nospace 2>/dev/null
}
complete -F _mova mova
"""


def bash(programs: Mapping[str, Command]) -> str:
    """The script. programs: {name: program}; a benchmark's name is `bench NAME`."""
    top = sorted({name.split()[0] for name in programs} | {"completion", "--help"})
    bench = sorted(name.split()[1] for name in programs if " " in name)
    cases = [_case("", top), _case("bench", [*bench, "--help"]), _case("completion", ["bash"])]
    cases += [_case(name, words_of(program, dict(programs))) for name, program in programs.items()]
    return SCRIPT.replace("@CASES@", "\n".join(cases))


def _case(program: str, words: list[str]) -> str:
    return f'        "{program}") words="{" ".join(words)}" ;;'


def words_of(program: Command, programs: Mapping[str, Command]) -> list[str]:
    """The words that may follow a program's name: key= of all keys, group=choice, key=true and key=false."""
    if program.schema is None:
        return ["--help"]
    schemas = [program.schema]
    if program.name == "launch":  # it takes the keys of training too
        schemas += [one for one in [programs["train"].schema] if one is not None]
    words = ["--help"]
    for schema in schemas:
        schema.register()
        with hydra.initialize_config_module(PACKAGE, version_base=None):
            groups = choices_by_group(schema)
        words += [f"{group}={choice}" for group, choices in groups.items() for choice in choices]
        for key in walk(schema.type, schema.variants):
            words += [f"{key.path}=true", f"{key.path}=false"] if key.type is bool else [f"{key.path}="]
    return list(dict.fromkeys(words))
