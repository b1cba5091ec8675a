"""Triton's interpreter, sooner done: what it looks up again at every step is looked up once.

Nothing that a kernel computes changes. Where a release of Triton has none of these functions, the interpreter
stays as it is.
"""

import functools


def install():
    """For the rest of the process."""
    from triton.runtime import interpreter

    for name, quicker in (("_patch_lang", _patch_once), ("_get_np_dtype", _dtype_by_name)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, quicker(getattr(interpreter, name)))


def _patch_once(patch_lang):
    """The interpreter replaces the functions of ``triton.language`` when a kernel is launched, and then once
    more, with the same ones, whenever the kernel calls a device function: a third of its time. Once a launch
    is enough for each module that a function may have them from.
    """
    launched, patched = None, set()

    @functools.wraps(patch_lang)
    def patch(function):
        nonlocal launched
        from triton import language

        known = [m for m in (language, language.core) if m in _modules_of(function)]
        if launched is not None and patched.issuperset(known):
            return launched
        scope = patch_lang(function)
        patched.update(known)
        if launched is None:  # a launch: its end undoes the replacements
            launched, restore = scope, scope.restore

            def end():
                nonlocal launched
                launched = None
                patched.clear()
                restore()

            scope.restore = end
        return scope

    return patch


@functools.cache
def _modules_of(function):
    module = type(functools)
    return [value for value in function.__globals__.values() if isinstance(value, module)]


def _dtype_by_name(get_np_dtype):
    """The interpreter builds a table of all dtypes whenever it asks for one."""
    from triton import language

    known = {}

    @functools.wraps(get_np_dtype)
    def dtype(wanted):
        element = wanted.element_ty if isinstance(wanted, language.block_type) else wanted
        name = "pointer" if isinstance(element, language.pointer_type) else element.name
        if name not in known:
            known[name] = get_np_dtype(wanted)
        return known[name]

    return dtype
