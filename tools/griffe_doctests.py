"""An extension of Griffe that shows the doctests of docstrings as code blocks on the documentation site."""

import re

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts fences around every doctest that begins at the margin."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(
                lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value
            )
