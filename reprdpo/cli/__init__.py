"""The command line: one file a command; this one picks the command and prints what went wrong."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from reprdpo.errors import UserError, did_you_mean, first_line

COMMANDS = {
    "demo": "the whole method on the embedded sandbox world",
    "run": "the whole pipeline from a YAML file, every stage resumable",
    "experiment": "the paper's tables and figures, by name",
    "fit": "fit the reward on the hidden states of a preference set",
    "sample": "draw responses, rank them by the reward, make pairs",
    "train": "align a model: SFT, DPO, cDPO or the method",
    "evaluate": "sample a model's responses to prompts and judge them",
    "report": "draw a run or experiments as pages",
    "score": "read prompt/response lines, write rewards",
    "datasets": "list the data sets that are read, or say what one source holds",
    "doctor": "versions, devices, active backends and why the others are not",
}

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import reprdpo

        print(f"reprdpo {reprdpo.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        meant = did_you_mean(arguments[0], COMMANDS) or ";"
        print(f"reprdpo: no command {arguments[0]!r}{meant} there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("reprdpo.data").setLevel(logging.INFO)  # which adapter took a source
    try:
        importlib.import_module(f"reprdpo.cli.{arguments[0]}").main(arguments[1:])
    except UserError as error:
        print(f"reprdpo {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nreprdpo {arguments[0]}: stopped; the same command again goes on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:
        missing = _what_is_missing(error)
        if missing is None:
            raise
        print(f"reprdpo {arguments[0]}: {missing}", file=sys.stderr)
        return 2
    return 0


def _what_is_missing(error: ImportError) -> str | None:
    """The line for a package that is not installed, a library's own where it has one; None where it is our mistake."""
    name = error.name or ""
    if not name or " " in name:  # importlib.metadata's name may be a sentence
        return first_line(ImportError(name or error))
    if isinstance(error, ModuleNotFoundError) and not name.startswith("reprdpo"):
        return f"needs {name}; pip install 'reprdpo[train]'"
    return None


def _overview() -> str:
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: reprdpo COMMAND [options]", "", *lines, "", "`reprdpo COMMAND --help` says more of each."]
    )
