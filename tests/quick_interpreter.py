"""A faster interpreter of Triton: what it looks up or makes again in every step is looked up or made once,
and what it computes for nothing is left out.

The results of kernels do not change. In releases of Triton without these functions the interpreter is not
changed.
"""

import functools


def install():
    """Make the interpreter faster for the rest of the process."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    for owner, name, quicker in (
        (interpreter, "_patch_lang", _patch_once),
        (interpreter, "_get_np_dtype", _dtype_by_name),
        (semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", _only_if_asserted),
        (semantic.TritonSemantic, "broadcast_impl_value", _only_if_shapes_differ),
        (core.block_type, "__init__", _block_by_shape),
        (core.tensor, "__init__", _shape_by_block),
    ):
        if hasattr(owner, name):
            setattr(owner, name, quicker(getattr(owner, name)))


def _only_if_asserted(sanitize):
    """Every addition and multiplication of 32-bit integers is done again in 64 bits and compared with the
    range, for an assertion that does nothing unless the interpreter has the option ``debug``, which is off.
    """

    @functools.wraps(sanitize)
    def check(self, *operands):
        if self.builder.options.debug:
            sanitize(self, *operands)

    return check


def _only_if_shapes_differ(broadcast):
    """Most operands have one shape."""

    @functools.wraps(broadcast)
    def quick(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return quick


def _block_by_shape(init):
    """The attributes of a type of blocks, which is made for every result, follow from its arguments."""
    known = {}

    @functools.wraps(init)
    def make(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in known:
            init(self, element_ty, shape)
            known[key] = {**vars(self), "shared": {}}
        vars(self).update(known[key], element_ty=element_ty)

    return make


def _shape_by_block(init):
    """The shape and the size of a tensor follow from its type."""
    of_scalars = {}

    @functools.wraps(init)
    def make(self, handle, type):
        shared = vars(type).get("shared") if type.is_block() else of_scalars
        if shared:
            vars(self).update(shared, handle=handle, type=type, dtype=type.scalar)
            return
        init(self, handle, type)
        if shared is not None:
            shared.update(shape=self.shape, numel=self.numel)

    return make


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
