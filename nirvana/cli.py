"""The command line: ``nirvana prune | select | score | plan | apply | eval | compare | ...``, see `COMMANDS`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import NoReturn

from nirvana import __version__
from nirvana.checkpoint.journal import NOTHING, recorded
from nirvana.commands import apply, bench, check, compare, eval, export, info, plan, prune, score, select
from nirvana.errors import NirvanaError
from nirvana.interruption import interruptions_kept
from nirvana.models import resolve_device
from nirvana.ops.backends import choose, use_backend
from nirvana.recipe import PRESETS

COMMANDS = {
    "prune": prune,
    "select": select,
    "score": score,
    "plan": plan,
    "apply": apply,
    "eval": eval,
    "compare": compare,
    "export": export,
    "info": info,
    "check": check,
    "bench": bench,
}

DESCRIPTION = """\
Structured pruning for large language models: removes whole MLP neurons and attention key/value groups, so that what
is left is a smaller dense model. 'prune' goes the whole way; 'score', 'plan' and 'apply' are its stages.
"""

EPILOG = """\
first steps:
  nirvana prune demo --sparsity 0.2 --out smaller --evaluate
  nirvana info smaller

exit codes: 0 done, 2 bad input (one line on stderr), 130 interrupted, 1 anything else
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other refusal; argparse would print the usage before it."""
        line = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"{self.prog}: {line}; see {self.prog} --help\n")


class Layout(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        """Names such as afr-abs-gmm stay whole, to be copied."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def build_parser(**defaults: object) -> argparse.ArgumentParser:
    parser = Parser(prog="nirvana", description=DESCRIPTION, epilog=EPILOG, formatter_class=Layout)
    parser.add_argument("--version", action="version", version=f"nirvana {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=module.EPILOG, formatter_class=Layout
        )
        module.add_arguments(command)
        command.set_defaults(**defaults)
        command.add_argument("--json", action="store_true", help="print the result as JSON, without progress bars")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, which ends with at most one line on stderr. What that says is written is what is on disk.

    Args:
        argv: without it the command line of this process, in which Ctrl-C after our last word leaves no traceback.

    Returns:
        The exit code.
    """
    args = _parse(argv)
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with interruptions_kept() as interruptions, recorded() as journal:
        try:
            try:
                _silence_libraries()
                with interruptions.surfacing(), _backend(args):
                    COMMANDS[args.command].run(args)
                code = _flush(args.command, 0)
            finally:
                # A second Ctrl-C has nothing left to interrupt.
                interruptions.over = True
        except BrokenPipeError:
            code = 1  # the reader has gone, which without buffers is found while printing
        except (NirvanaError, OSError) as error:
            # An OSError that nobody has put into words is about a name or a place that the user gave: too long, no
            # access.
            if args.debug:
                raise
            code = _refuse(args.command, _and_what_stands(str(error), journal.outcome()), 2)
        except KeyboardInterrupt:
            code = _refuse(args.command, f"interrupted; {journal.outcome()}", 130)
    return _flush(args.command, code)


def _and_what_stands(message: str, outcome: str) -> str:
    """A refusal after something was written says so, unless it does already."""
    return message if outcome == NOTHING or outcome in message else f"{message}; {outcome}"


def _flush(command: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        # The reader (head, less) has gone, or the disk is full: drop the rest, or Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or (1 if isinstance(error, BrokenPipeError) else _refuse(command, f"stdout: {error}", 1))
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """A preset stands in for the defaults: what is given beside it wins, wherever it stands on the line."""
    args = build_parser().parse_args(argv)
    if getattr(args, "preset", None) in PRESETS:  # an unknown name is refused by the command
        args = build_parser(**PRESETS[args.preset]).parse_args(argv)
    return args


def _backend(args: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """The kernels that `--backend` asks for; refused at once where they cannot serve the device of the job."""
    if not hasattr(args, "backend"):
        return contextlib.nullcontext()
    chosen = use_backend(args.backend)
    choose(resolve_device(getattr(args, "device", "cpu")))
    return chosen


def _refuse(command: str, message: str, code: int) -> int:
    """One line on stderr, whatever names with newlines the message repeats."""
    print(f"nirvana {command}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _silence_libraries() -> None:
    """Their notes are not about what the user asked; ours are the only lines on stderr."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
