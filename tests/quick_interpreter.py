"""A faster interpreter of Triton: values that it looks up again in every step are looked up once.

The results of kernels do not change. In releases of Triton without these functions the interpreter is not
changed.
"""

import functools


def install():
    """Make the interpreter faster for the rest of the process."""
    from triton.runtime import interpreter

    for name, quicker in (("_patch_lang", _patch_once), ("_get_np_dtype", _dtype_by_name)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, quicker(getattr(interpreter, name)))


def _patch_once(patch_lang):
    """The interpreter replaces the functions of ``triton.language`` when a kernel is launched, and again,
    with the same ones, whenever the kernel calls a device function, which takes a third of its time. Once per
    launch is enough for each module from which a function may get them.
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
    """Cache the dtypes by name, because the interpreter builds a table of all dtypes for each request."""
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
