"""The wrapper of all programs: composes the config, runs the program, and reports a user's mistake in one line.

    PROGRAM = Program("index", __doc__, run, Schema("index", IndexConfig))

    if __name__ == "__main__":
        PROGRAM.start()

`mova index` and `python -m` on the module that holds it are the same code. Exit statuses: core/errors.py.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf

from core.compose import Composed, Schema, compose
from core.errors import EXIT_FAILED, EXIT_OK, UserError, end_process, in_one_line, status_of
from core.help import describe
from core.secrets import without_secrets
from core.typed import write_text

T = TypeVar("T")
HELP = ("-h", "--help")
KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@-]*")  # what may stand before the = of key=value
SHOW = ("--cfg", "-c")  # --cfg job: Hydra's option for the composed config


@dataclass(frozen=True)
class Call(Generic[T]):
    """The command line of a program. config: checked; plain: the same as nested plain values; choices: {group: name};
    overrides: key=value as typed; command: all of it, as text."""

    config: T
    plain: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    command: str


@dataclass(frozen=True)
class Command:
    """A program that takes plain arguments, such as folders. main: takes them, returns the exit status (None: 0)."""

    name: str
    doc: str | None
    main: Callable[[list[str]], int | None]
    before: Callable[[], None] | None = None  # first of all in a process of its own
    interrupted: str = "interrupted"
    schema: Schema | None = None  # whose keys --help lists
    command: str = ""  # that starts it, where that is not `mova NAME`
    failed: int | None = None  # the exit status of every error, where it is not the error's own

    def start(self) -> NoReturn:
        """Run with the arguments of this process, then end it."""
        try:
            status = self.begin()
        except Exception:
            sys.excepthook(*sys.exc_info())
            status = EXIT_FAILED
        end_process(status)

    def begin(self) -> int:
        """As `start`, but returns the exit status: for a caller that ends the process itself."""
        if self.before is not None:
            self.before()
        return self.run(sys.argv[1:])

    def run(self, arguments: Sequence[str]) -> int:
        """Run with these arguments; returns the exit status. Errors other than a user's are raised."""
        try:
            if set(HELP) & set(arguments):
                print(self.help(), end="")
                return EXIT_OK
            return self.act(list(arguments)) or EXIT_OK
        except BrokenPipeError:  # `mova ... | head`: nobody reads any more
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for what is still printed, and its end
            return EXIT_FAILED
        except (UserError, OSError) as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {without_secrets(in_one_line(error))}", file=sys.stderr)
            return status_of(error) if self.failed is None else self.failed
        except KeyboardInterrupt as error:
            print(self.interrupted, file=sys.stderr)
            return status_of(error)

    @property
    def typed(self) -> str:
        """The command that starts it."""
        return self.command or f"mova {self.name}"

    def help(self) -> str:
        """The text that --help prints."""
        return describe(self.typed, self.doc or "", self.schema)

    def act(self, arguments: list[str]) -> int | None:
        """Run the program itself; returns the exit status."""
        return self.main(arguments)


def refuse_options(command: str, arguments: Sequence[str], least: int, most: int | None = None) -> None:
    """UserError unless a Command got a permitted number of arguments and no options."""
    options = [argument for argument in arguments if argument.startswith("-")]
    if options or len(arguments) < least or (most is not None and len(arguments) > most):
        what = f"{options[0]} is not an option" if options else f"{len(arguments)} arguments are given"
        raise UserError(f"{what}: {command} takes {'one folder' if most == 1 else 'folders'} ({command} --help)")


@dataclass(frozen=True)
class Program(Command):
    """A program that takes key=value. main: takes a Call; first: the key that a first argument without = sets."""

    main: Callable[[Any], int | None]
    schema: Schema = field(kw_only=True)
    first: str = field(default="", kw_only=True)

    def act(self, arguments: list[str]) -> int | None:
        """Compose and check the config, then run."""
        overrides, show = self.split(arguments)
        composed = compose(self.schema, overrides)
        if show:
            print(_shown(composed), end="")
            return EXIT_OK
        return self.main(self.call(arguments, overrides, composed))

    def call(self, arguments: Sequence[str], overrides: list[str], composed: Composed) -> Call[Any]:
        """What `main` takes. ConfigError for a missing, impossible or contradictory value."""
        command = " ".join([self.typed, *map(shlex.quote, arguments)])
        return Call(composed.typed(), composed.plain(), composed.choices, overrides, command)

    def split(self, arguments: Sequence[str]) -> tuple[list[str], bool]:
        """(key=value arguments, whether --cfg job asks to print only the config)."""
        rest, show = list(arguments), False
        for option in SHOW:
            if option in rest:
                at = rest.index(option)
                if rest[at + 1 : at + 2] != ["job"]:
                    raise UserError(f"{option}: the only option here is `--cfg job`, which prints the composed config")
                rest[at : at + 2] = []
                show = True
        if self.first and rest and not rest[0].startswith("-") and self._is_plain(rest[0]):
            rest[0] = f"{self.first}={write_text(rest[0])}"
        return rest, show

    @staticmethod
    def _is_plain(argument: str) -> bool:
        key, equals, _ = argument.partition("=")
        return not equals or KEY.fullmatch(key) is None


def _shown(composed: Composed) -> str:
    """The composed config as YAML; missing values appear as ???."""
    values = OmegaConf.to_container(composed.config, resolve=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
