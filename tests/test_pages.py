"""The documentation site describes everything that is public. ``make docs`` checks the rest."""

from pathlib import Path

import coda_fast

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_on_a_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    described = {line.removeprefix("::: ") for line in pages.splitlines() if line.startswith("::: ")}
    # the functions of these modules are described one by one
    modules = {"data", "functional", "pretrained", "__version__"}
    assert {f"coda_fast.{name}" for name in set(coda_fast.__all__) - modules} <= described


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 10
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_example_is_included_in_its_page():
    """An include line that differs from this form would be shown as text."""
    lines = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8").splitlines()
    scripts = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 5
    assert sorted(line for line in lines if "examples/" in line and ".py" in line and "test" not in line) == [
        f'--8<-- "examples/{name}"' for name in scripts
    ]
