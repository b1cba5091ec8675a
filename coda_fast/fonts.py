"""Names of classes in every script: which installed font has their characters, for figures and videos."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import unicodedata
import warnings
from pathlib import Path

# Of packages that ship fonts, those that are looked through where they are installed (none is imported)
_PACKAGES = ("matplotlib_fontja", "manimgx_fonts", "manimgx_fonts_cjk", "mplfonts", "koreanize_matplotlib")
# joiners and variation selectors: nothing is missing where a font lacks them
_IGNORABLE = frozenset("\u200c\u200d\ufe0e\ufe0f")
_LOST: set[str] = set()


def drawable(text: str) -> tuple[str, list[str]]:
    """A text as figures can show it, and the families of fonts to draw it with.

    What matplotlib's default font lacks (Chinese, Japanese, emoji ...) comes from the first installed font
    that has it: of matplotlib, of the system, or of a package such as matplotlib-fontja. What no font has is
    drawn as U+25A1, an empty box, and named in one warning; control characters are drawn as U+FFFD.
    """
    from matplotlib import rcParams

    text, fonts = _with_fonts(text)
    return text, [*rcParams["font.family"], *dict.fromkeys(entry.name for entry in fonts.values())]


def pieces(text: str) -> list[tuple[str, str]]:
    """The same for who draws with one font at a time: the text in pieces, each with the file of its font."""
    text, fonts = _with_fonts(text)
    default = _default_font()
    return [
        ("".join(piece), file)
        for file, piece in itertools.groupby(text, lambda c: fonts[c].fname if c in fonts else default)
    ]


def _with_fonts(text):
    """The text with what cannot be drawn replaced, and the fonts of those characters that the default font
    lacks.
    """
    text = "".join(map(_visible, " ".join(text.split())))
    default = _opened(_default_font())
    foreign = {c for c in text if not default.get_char_index(ord(c))}
    found = _fonts_with(foreign)
    fonts = {c: entry for c, entry in found.items() if entry is not None}
    lost = foreign - set(fonts)
    _say_lost(lost - _IGNORABLE)
    return "".join("" if c in lost & _IGNORABLE else "\u25a1" if c in lost else c for c in text), fonts


def _visible(character):
    category = unicodedata.category(character)
    if category == "Cf" and character not in _IGNORABLE:
        return ""  # marks of direction and the like: a name could turn the text around it
    return "\ufffd" if category in ("Cc", "Cs") else character


def _say_lost(characters):
    if fresh := characters - _LOST:
        _LOST.update(fresh)
        some = " ".join(f"{c} (U+{ord(c):04X})" for c in sorted(fresh)[:5]) + (
            " ..." if len(fresh) > 5 else ""
        )
        warnings.warn(
            f"figures: no installed font has {some}, drawn as \u25a1; install one, such as Noto Sans CJK or "
            "Noto Emoji, or that of "
            f"pip install 'coda-fast[fonts]' for Japanese and many Chinese characters",
            stacklevel=5,
        )


def _default_font():
    from matplotlib import font_manager

    return font_manager.findfont(font_manager.FontProperties())


@functools.lru_cache(maxsize=8)
def _opened(path):
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


# of characters that were looked for: the font, or None
_FONTS: dict[str, str | None] = {}


def _fonts_with(characters):
    """For each of the characters an installed font, upright and of normal weight if there is one; None:
    there is none.
    """
    if wanted := characters - set(_FONTS):
        known = _entries()
        _FONTS.update(dict.fromkeys(wanted))
        _look(known, wanted)
        # fonts that came after matplotlib had made its list
        if lost := {c for c in wanted - _IGNORABLE if _FONTS[c] is None}:
            _look([entry for entry in _entries(refreshed=True) if entry not in known], lost)
    return {c: _FONTS[c] for c in characters}


def _look(entries, wanted):
    remaining = set(wanted)
    for entry in sorted(
        entries, key=lambda entry: (entry.style != "normal", str(entry.weight) not in ("400", "normal"))
    ):
        if not remaining:
            return
        try:
            font = _opened(entry.fname)
            found = {c for c in remaining if font.get_char_index(ord(c))}
        except Exception:  # whatever a font file is, it is not worth a figure
            continue
        _FONTS.update(dict.fromkeys(found, entry))
        remaining -= found


def _entries(refreshed=False):
    """What matplotlib knows of fonts, with those of the packages, and, refreshed, with all that the system
    has by now.
    """
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    paths = [path for name in _PACKAGES for path in _package_fonts(name)]
    for path in [*paths, *(font_manager.findSystemFonts() if refreshed else ())]:
        if path not in known:
            with contextlib.suppress(Exception):  # one that matplotlib cannot read, as coloured emoji
                manager.addfont(path)
    # boxes with numbers
    return [entry for entry in manager.ttflist if not entry.name.startswith("Last Resort")]


def _package_fonts(name):
    package = importlib.util.find_spec(name)
    folders = (package and package.submodule_search_locations) or ()
    return sorted(
        str(path)
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    )
