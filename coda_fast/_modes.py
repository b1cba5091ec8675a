"""Context managers that change the calls of DAU layers: explanation mode, and functions that stand in for
layers.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Explanation mode belongs to a call, not to a module: no state shared between threads or tasks is written.
# Each ``with`` opens a scope. A context variable holds the scopes that a call is in, so threads begin with
# none and asyncio tasks have their own; each layer checks whether it is in one of them. Leaving a ``with``
# closes its scope, even from another context (an asynchronous generator that the event loop finalises) or
# out of order (two generators that take turns).
_NUMBERS = itertools.count()  # identify layers: compiled code can compare a number, but not an address
_SCOPES: contextvars.ContextVar[tuple[_Scope, ...]] = contextvars.ContextVar(
    "coda_fast.explanation_mode", default=()
)


class _Scope:
    def __init__(self, layers: frozenset[int]):
        self.layers, self.open = layers, True


class _Thread(threading.local):
    """What torch.compile needs besides the context variable: it can trace attributes of an object, but not
    the setting of a context variable, nor, before torch 2.14, the reading of one.
    """

    def __init__(self):
        self.entered = ()  # the scopes that compiled code is in
        # a copy of the context variable for compiled code before torch 2.14; all tasks of a thread share it
        self.mirror = ()
        self.stand_in = None  # what is called in place of DAU layers, see ``calls_replaced``


THREAD = _Thread()
_TRACES_CONTEXT_VARIABLES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def _scopes():
    if torch.compiler.is_dynamo_compiling() and not _TRACES_CONTEXT_VARIABLES:
        return THREAD.mirror + THREAD.entered
    return _SCOPES.get() + THREAD.entered


def _enter(scope):
    scopes = (*(s for s in _SCOPES.get() if s.open), scope)
    _SCOPES.set(scopes)
    THREAD.mirror = scopes


def _leave(scope):
    scope.open = False
    scopes = tuple(s for s in _SCOPES.get() if s.open)
    _SCOPES.set(scopes)
    THREAD.mirror = scopes


class ModalLayer(nn.Module):
    """A layer whose calls may be in explanation mode, and may be replaced by ``calls_replaced``."""

    def __init__(self) -> None:
        super().__init__()
        self._number = next(_NUMBERS)

    @property
    def explaining(self) -> bool:
        """Whether a call made here and now is in explanation mode: see ``explanation_mode``."""
        if self._replica_explains:
            return True
        return any(scope.open and self._number in scope.layers for scope in _scopes())

    # A replica of torch.nn.DataParallel takes its mode from the call that made it, because its own thread
    # begins with an empty context.
    _replica_explains = False

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._replica_explains = self.explaining
        return replica

    def __setstate__(self, state):
        # A copy (copy, deepcopy, pickle) is a new layer, outside any scope of explanation mode that the
        # original is in.
        super().__setstate__(state)
        self._number = next(_NUMBERS)


@contextlib.contextmanager
def explanation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Within it, every DAU layer of ``module`` treats its scaled weight as a constant in the backward pass.

    The gradient of an output with respect to the input is then the row of the global linear map ``W(x)``. The
    mode is a property of the calls made within the ``with``, in its thread and asyncio task: it does not
    affect other threads, tasks, copies or later calls, and a module can be explained in many threads while it
    trains in another. A call keeps its mode wherever and whenever its backward pass runs, even if a
    checkpointed segment is recomputed after the ``with``. This needs ``use_reentrant=False``; a reentrant
    checkpoint, which recomputes without knowing how it was called, is refused. A compiled module has one
    graph for each mode.

    As with ``torch.no_grad``, a generator that yields within the ``with`` leaves the mode on for the code
    that it yields to, until it resumes.

    Raises:
        ValueError: the module has no DAU layers. RuntimeError, at the call: the checkpoint is reentrant.

    >>> import torch, coda_fast
    >>> net = torch.nn.Sequential(coda_fast.DAUConv2d(6, 8, 3, rank=4), coda_fast.DAUConv2d(8, 2, 3, rank=4))
    >>> x = torch.rand(1, 6, 8, 8, requires_grad=True)
    >>> with coda_fast.explanation_mode(net):
    ...     total = net(x).sum()
    ...     (row,) = torch.autograd.grad(total, x)
    >>> torch.allclose((row * x).sum(), total, atol=1e-5)
    True
    """
    numbers = [m._number for m in module.modules() if isinstance(m, ModalLayer)]
    if not numbers:
        raise ValueError(
            f"explanation_mode: expected a module with at least one DAUConv2d, got {type(module).__name__} "
            "without any"
        )
    scope = _Scope(frozenset(numbers))
    if torch.compiler.is_dynamo_compiling():
        before = THREAD.entered
        THREAD.entered = (*before, scope)
        try:
            yield module
        finally:
            THREAD.entered = before
        return
    _enter(scope)
    try:
        yield module
    finally:
        _leave(scope)


@contextlib.contextmanager
def calls_replaced(stand_in: Callable[[Any, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it, and in this thread alone, ``stand_in(layer, input)`` is called in place of every DAU layer's
    ``forward``, which ``stand_in`` may call in turn.

    Tools that must see how a network uses its layers, whatever its ``forward``, thus need neither hooks,
    which all threads would share, nor a copy. No code of another asyncio task may run within it.
    """
    before, THREAD.stand_in = THREAD.stand_in, stand_in
    try:
        yield
    finally:
        THREAD.stand_in = before


def call_stand_in(layer, input):
    stand_in, THREAD.stand_in = THREAD.stand_in, None
    try:
        return stand_in(layer, input)
    finally:
        THREAD.stand_in = stand_in


def refuse_reentrant_checkpoint():
    """Raise a RuntimeError inside a reentrant checkpoint: its forward pass runs without a graph, and when its
    backward pass calls a layer again, that call cannot know the mode of the first one.
    """
    forward = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is forward:
            raise RuntimeError(
                "explanation_mode: expected torch.utils.checkpoint with use_reentrant=False, got a "
                "reentrant one, which would recompute "
                "outside of the mode"
            )
        frame = frame.f_back
