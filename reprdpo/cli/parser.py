"""The parser of every command: what is wrong with an option is one line, with the nearest option that exists."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from reprdpo.errors import UserError, did_you_mean

_OPTION = re.compile(r"(--?[A-Za-z][\w.-]*)(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose complaints are a :class:`UserError`, an option that does not exist the first."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As the base class; before anything else, such as what is missing, every option must be one."""
        known = self._option_string_actions
        for argument in args or ():
            if argument == "--":
                break
            found = _OPTION.fullmatch(argument)
            if found and not any(option.startswith(found[1]) for option in known):  # argparse takes what begins one
                self.error(f"{found[1]}: no such option{did_you_mean(found[1], known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` with where help is."""
        raise UserError(f"{message}{'' if message.endswith('?') else ';'} `{self.prog} --help` lists what there is")
