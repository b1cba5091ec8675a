"""Every public function of the package has type hints, and the packages declare that they do (PEP 561)."""

import ast
import pathlib

import pytest

import coda_fast
import coda_kernels

PACKAGE = pathlib.Path(coda_fast.__file__).parent


def is_public(name):
    return not name.startswith("_") or name in ("__init__", "__call__")


def public_modules():
    """Modules that a user may import, as paths in which no part begins with an underscore. Those of the
    commands are left out, because click defines their arguments.
    """
    names = (path.relative_to(PACKAGE).with_suffix("").as_posix() for path in sorted(PACKAGE.rglob("*.py")))
    return [name for name in names if all(map(is_public, name.split("/"))) and not name.startswith("cli/")]


def public_functions(node, prefix=""):
    """(dotted name, function) of the public functions and methods of a module."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and is_public(child.name):
            yield from public_functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(child.name):
            yield prefix + child.name, child


def missing_hints(source):
    """The missing type hints of a module: names of public functions with the parameter, or "return"."""
    for name, function in public_functions(ast.parse(source)):
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        decorators = {
            decorator.id for decorator in function.decorator_list if isinstance(decorator, ast.Name)
        }
        if "." in name and "staticmethod" not in decorators:
            positional = positional[1:]  # self or cls
        for parameter in (*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
            if parameter is not None and parameter.annotation is None:
                yield f"{name}: {parameter.arg}"
        if function.returns is None and not name.endswith("__init__"):
            yield f"{name}: return"


def test_missing_hints_are_found():
    source = """
def plain(a, b: int, *rest, key=1, **options): ...
def whole(a: int, *rest: int, key: int = 1, **options: int) -> int: ...
def _private(a): ...
class Public:
    def __init__(self, a): ...
    def __len__(self): ...
    def method(self, a: int): ...
    @staticmethod
    def static(a) -> int: ...
    @classmethod
    def make(cls, a) -> int: ...
class _Private:
    def method(self, a): ...
"""
    assert list(missing_hints(source)) == [
        "plain: a",
        "plain: key",
        "plain: rest",
        "plain: options",
        "plain: return",
        "Public.__init__: a",
        "Public.method: return",
        "Public.static: a",
        "Public.make: a",
    ]


def test_the_public_modules_are_found():
    assert {"__init__", "nn", "data/sources", "train/loop"} <= set(public_modules())
    assert not {"_autograd", "evaluation/_common"} & set(public_modules())


@pytest.mark.parametrize("module", public_modules())
def test_public_functions_have_complete_type_hints(module):
    assert not list(missing_hints((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("package", [coda_fast, coda_kernels])
def test_the_package_says_that_it_is_typed(package):
    assert (pathlib.Path(package.__file__).parent / "py.typed").is_file()
