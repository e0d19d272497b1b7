"""The command line: `linearize inspect | compress | verify | bench | export`.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 the two models of
`verify` differ, 2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from linearize._version import __version__
from linearize.cli.bench import bench
from linearize.cli.compress import compress
from linearize.cli.export import export
from linearize.cli.inspect import inspect
from linearize.cli.verify import verify
from linearize.errors import LinearizeError

__all__ = ["app", "main", "run"]

_INTERRUPTED = 130  # what shells expect: 128 and the number of the signal

app = typer.Typer(
    name="linearize",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"linearize {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=False)
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained PyTorch models smaller and faster.

    linearize finds hidden channels that no longer need their nonlinearity, and multiplies them into the neighbouring
    layers. This last step does not change the function.

    MODEL is timm:NAME, hf:FOLDER_OR_NAME, package.module:callable, or a .safetensors file that linearize saved. The
    module of a callable is imported and the callable is called.
    """


app.command()(inspect)
app.command()(compress)
app.command()(verify)
app.command()(bench)
app.command()(export)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; a mistake of the user never raises an exception.

    Args:
        arguments: as in `sys.argv[1:]`; none at all shows the help.

    Examples:
        >>> run(["--version"])
        linearize ...
        0
    """
    command = typer.main.get_command(app)
    try:
        with _quiet_libraries():
            code = command.main(list(arguments) or ["--help"], prog_name="linearize", standalone_mode=False)
    except LinearizeError as error:
        return _fail(_told_for_a_shell(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - stands in until the exit
        return 0
    except Exception as error:
        if hasattr(error, "format_message"):  # bad options, as the parser found them
            return _fail(f"{error.format_message()} See linearize --help.", 2)
        if os.environ.get("LINEARIZE_DEBUG"):
            raise
        found = f"unexpected {type(error).__name__}: {error} (LINEARIZE_DEBUG=1 shows where)"
        return _fail(found, 1)
    if code == _INTERRUPTED:
        return _fail("interrupted", _INTERRUPTED)
    return code if isinstance(code, int) else 0


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Inside, warnings and error logs of other libraries are hidden: our own message says in one line what matters."""
    if os.environ.get("LINEARIZE_DEBUG"):
        yield
        return
    before = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="linearize")
            warnings.showwarning = _show_warning
            yield
    finally:
        logging.disable(before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _told_for_a_shell(error: LinearizeError) -> str:
    """The error's text, with a remedy that can be typed."""
    if "overwrite=True" in error.remedy:
        return f"{error.where}: {error.found}. Pass --overwrite, or another --out."
    if "example_inputs=" in error.remedy:
        return f"{error.where}: {error.found}. Pass the shape of one sample, for example --shape 3x224x224."
    return str(error)


def _fail(message: Any, code: int) -> int:
    """One line on standard error, whatever the message holds."""
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    return code


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
