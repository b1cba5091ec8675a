"""The command line: ``coda-fast demo|train|explain|channels|evaluate|report|app|compile|export|info``, with a
module for each command. Bad input gives a one-line message and exit code 2, and writes no file.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import torch

from coda_fast import backends, safety
from coda_fast._version import __version__
from coda_fast.explain import PixelRangeWarning

try:
    import click
    import tqdm  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"coda-fast: the command line needs {error.name}: pip install 'coda-fast[cli]'"
    ) from None

from coda_fast.cli import app, channels, compile, demo, evaluate, explain, export, info, report, train

BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    warnings.showwarning = _warn
    try:
        code = cli.main(arguments, prog_name="coda-fast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(BAD_INPUT) from None
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        raise SystemExit(130) from None
    except (ValueError, ImportError, OSError, backends.BackendUnavailable) as error:
        # The library raises these for bad input, with a clear one-line message. Anything else is a bug and
        # keeps its traceback.
        if isinstance(error, OSError) and error.filename is not None:  # of the system, with a number
            _fail(f"{error.filename}: {error.strerror}")
        _fail(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        _fail(f"not enough memory: {error or 'of this machine'}")
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's message on a CPU
            raise
        _fail(f"not enough memory: {str(error).partition('DefaultCPUAllocator: ')[2] or error}")
    raise SystemExit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coda-fast")
@click.option(
    "--import",
    "modules",
    multiple=True,
    metavar="MODULE",
    help="A module to import first, from the working directory or as installed: of networks or attribution "
    "methods that it registers. May be repeated.",
)
def cli(modules: tuple[str, ...]) -> None:
    """Convolutional Dynamic Alignment Networks: image classifiers that explain themselves."""
    if modules:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not search there
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise click.BadParameter(f"{module!r}: {error}", param_hint="--import") from error


for _module in (demo, train, explain, channels, evaluate, report, app, compile, export, info):
    cli.add_command(_module.command)


def _warn(message, category, filename, lineno, file=None, line=None):
    """Show our own warnings in one line, and those of libraries as Python does."""
    if (
        issubclass(category, PixelRangeWarning)
        or Path(filename).parent.parent.name == "coda_fast"
        or Path(filename).parent.name == "coda_fast"
    ):
        click.echo("coda-fast: warning: " + " ".join(str(message).split()), err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _fail(message):
    click.echo("coda-fast: " + safety.printable(" ".join(message.split())), err=True)
    raise SystemExit(BAD_INPUT)
