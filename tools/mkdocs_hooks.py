"""A hook of mkdocs (``make docs``) that adds formulas and pages of commands to the documentation site.

Formulas, written as on GitHub (blocks of ``math``, and inline between ``$`` and backticks), become MathML,
which a browser shows without a script, so that the site loads nothing from other servers. The page of a
command is generated from its click command.
"""

import inspect
import re
from html import escape

import click
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from coda_fast.cli import cli

_FORMULA = re.compile(r"^```math\n(?P<block>.*?)\n```$|\$`(?P<inline>[^`]+)`\$", re.MULTILINE | re.DOTALL)
_PLACE = "FORMULA{}AT"
_CODE = re.compile(r"<code>[^<]*</code>")
_COMMANDS = "<!-- commands -->"
# their tables are as wide as the page, without a table of contents next to it
_WIDE = ("numbers.md", "benchmark.md", "kernels.md")


def on_files(files, config):
    """Add a page for each command. A command that ``nav`` does not list, or a listed one that does not exist,
    fails a strict build.
    """
    for name in cli.commands:
        files.append(File.generated(config, f"commands/{name}.md", content=_described(name)))


def on_page_markdown(markdown, page, **_):
    """List the commands, and replace formulas by placeholders that no Markdown extension changes."""
    if page.file.src_uri in _WIDE:
        page.meta.setdefault("hide", ["toc"])
    page.formulas = []

    def replace(match):
        kind = match.lastgroup
        page.formulas.append(convert(match[kind], display=kind))
        place = _PLACE.format(len(page.formulas) - 1)
        return place if kind == "inline" else f"\n{place}\n"

    markdown = _FORMULA.sub(replace, markdown)
    if _COMMANDS in markdown:
        rows = (f"| [{name}](commands/{name}.md) | {_summary(name)} |" for name in cli.commands)
        markdown = markdown.replace(_COMMANDS, "\n".join(["| command | |", "|---|---|", *rows]))
    return markdown


def on_page_content(html, page, **_):
    """Replace the placeholders by formulas. An escaped pipe in code becomes a pipe, as on GitHub."""
    html = _CODE.sub(lambda match: match[0].replace("\\|", "|"), html)
    for index, formula in enumerate(page.formulas):
        html = html.replace(_PLACE.format(index), formula)
    return html


def _summary(name):
    """The first paragraph of a command's help, as one line."""
    return " ".join(inspect.cleandoc(cli.commands[name].help).partition("\n\n")[0].split())


def _described(name):
    """The page of a command: its usage, its help, and a table of its options."""
    command = cli.commands[name]
    context = click.Context(
        command, info_name=f"coda-fast {name}", parent=click.Context(cli, **cli.context_settings)
    )
    usage = " ".join(command.collect_usage_pieces(context))
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    rows = [
        f"<tr><td><code>{escape(option)}</code></td><td>{escape(text)}</td></tr>"
        for option, text in (option.get_help_record(context) for option in options)
    ]
    return "\n".join(
        [
            f"# coda-fast {name}",
            f"\n    coda-fast {name} {usage}\n",
            inspect.cleandoc(command.help),
            "\n<table>",
            *rows,
            "</table>",
        ]
    )
