"""A hook of the documentation site: formulas, written as on GitHub, become MathML in the page itself.

```math ... ``` is a formula of its own, $`...`$ one in a line. A browser shows MathML without a script, so the
site loads nothing from elsewhere.
"""

import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r"^```math\n(?P<block>.*?)\n```$|\$`(?P<inline>[^`]+)`\$", re.MULTILINE | re.DOTALL)
_PLACE = "FORMULA{}AT"


def on_page_markdown(markdown, page, **_):
    """Formulas give way to words that no extension of Markdown touches."""
    page.formulas = []

    def replace(match):
        kind = match.lastgroup
        page.formulas.append(convert(match[kind], display=kind))
        place = _PLACE.format(len(page.formulas) - 1)
        return place if kind == "inline" else f"\n{place}\n"

    return _FORMULA.sub(replace, markdown)


def on_page_content(html, page, **_):
    """And come back as MathML."""
    for index, formula in enumerate(page.formulas):
        html = html.replace(_PLACE.format(index), formula)
    return html
