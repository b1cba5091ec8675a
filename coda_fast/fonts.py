"""Fonts for class names in any script: the installed fonts whose characters figures and videos need."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import unicodedata
import warnings
from pathlib import Path
from typing import Any

# Packages that ship fonts; those that are installed are searched, none is imported.
_PACKAGES = ("matplotlib_fontja", "manimgx_fonts", "manimgx_fonts_cjk", "mplfonts", "koreanize_matplotlib")
# joiners and variation selectors: a font may lack them without loss
_IGNORABLE = frozenset("\u200c\u200d\ufe0e\ufe0f")
_LOST: set[str] = set()


def drawable(text: str) -> tuple[str, list[str]]:
    """A text as figures can show it, and the font families to draw it with.

    Characters that matplotlib's default font lacks (Chinese, Japanese, emoji ...) come from the first
    installed font that has them: matplotlib's, the system's, or one of a package such as matplotlib-fontja.
    Characters that no font has are drawn as U+25A1, an empty box, and named in one warning; control
    characters are drawn as U+FFFD.
    """
    from matplotlib import rcParams

    text, fonts = _with_fonts(text)
    return text, [*rcParams["font.family"], *dict.fromkeys(entry.name for entry in fonts.values())]


def pieces(text: str) -> list[tuple[str, str]]:
    """The same for callers that draw with one font at a time: (piece of the text, font file) pairs."""
    text, fonts = _with_fonts(text)
    default = _default_font()
    return [
        ("".join(piece), file)
        for file, piece in itertools.groupby(text, lambda c: fonts[c].fname if c in fonts else default)
    ]


def _with_fonts(text):
    """The text with undrawable characters replaced, and the fonts for characters that the default font
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
        return ""  # direction marks and the like, with which a name could reorder the text around it
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


# the font of each character searched for so far, or None
_FONTS: dict[str, Any] = {}


def _fonts_with(characters):
    """An installed font for each of the characters, upright and of normal weight if possible; None if there
    is no font.
    """
    if wanted := characters - set(_FONTS):
        known = _entries()
        _FONTS.update(dict.fromkeys(wanted))
        _look(known, wanted)
        # fonts that were installed after matplotlib made its list
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
        except Exception:  # no broken font file may make a figure fail
            continue
        _FONTS.update(dict.fromkeys(found, entry))
        remaining -= found


def _entries(refreshed=False):
    """The fonts that matplotlib knows and those of the packages; if ``refreshed``, also all that the system
    has now.
    """
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    paths = [path for name in _PACKAGES for path in _package_fonts(name)]
    for path in [*paths, *(font_manager.findSystemFonts() if refreshed else ())]:
        if path not in known:
            with contextlib.suppress(Exception):  # fonts that matplotlib cannot read, such as coloured emoji
                manager.addfont(path)
    # without fonts that draw any character as a box with its code
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
