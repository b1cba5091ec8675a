"""What changes the calls of DAU layers within a ``with``: explanation mode, and functions that stand in for
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

# Explanation mode belongs to a call, not to a module: what is shared between threads and tasks is never
# written. Each ``with`` is a scope; the scopes that a call is in are a context variable, so threads begin
# with none, asyncio's tasks have their own, and each layer looks whether it is in one. A scope that was left
# is closed, which counts also where it was left from another context (an asynchronous generator that is
# finalised by the event loop) or out of order (two generators that take turns).
_NUMBERS = itertools.count()  # layers by number: a value that compiled code can compare, unlike an address
_SCOPES: contextvars.ContextVar[tuple[_Scope, ...]] = contextvars.ContextVar(
    "coda_fast.explanation_mode", default=()
)


class _Scope:
    def __init__(self, layers: frozenset[int]):
        self.layers, self.open = layers, True


class _Thread(threading.local):
    """What torch.compile needs beside the context variable: it can trace attributes of an object, but not
    setting a context variable, and before torch 2.14 not reading one.
    """

    def __init__(self):
        self.entered = ()  # scopes that compiled code entered, while it is in them
        # of the context variable, for compiled code of older releases: of this thread, whichever its tasks
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
    """A layer whose calls may be in explanation mode, and that ``calls_replaced`` may call something else
    for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._number = next(_NUMBERS)

    @property
    def explaining(self) -> bool:
        """Whether a call made here and now is in explanation mode: see ``explanation_mode``."""
        if self._replica_explains:
            return True
        return any(scope.open and self._number in scope.layers for scope in _scopes())

    # The mode of a replica of torch.nn.DataParallel is that of the call which made it: its thread begins with
    # an empty context.
    _replica_explains = False

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._replica_explains = self.explaining
        return replica

    def __setstate__(self, state):
        # A copy (copy, deepcopy, pickle) is a layer of its own, whatever scope of explanation mode its
        # original is in.
        super().__setstate__(state)
        self._number = next(_NUMBERS)


@contextlib.contextmanager
def explanation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Within it, every DAU layer of ``module`` treats its scaled weight as a constant in the backward pass.

    The gradient of an output with respect to the input is then the row of the global linear map ``W(x)``. It
    is a property of the calls made within the ``with``, in its thread and asyncio task: other threads, tasks,
    copies and later callers see nothing of it, and a module can be explained in many threads while it trains
    in another. What was computed within it stays as it was computed, wherever and whenever its backward pass
    runs, also if a checkpointed segment is recomputed after the ``with`` (``use_reentrant=False``; the older
    form, which recomputes without a trace of how it was called, is refused). A compiled module has one graph
    for each mode.

    As with ``torch.no_grad``, a generator that yields within it leaves it on for the code that it yields to,
    until it goes on.

    Raises:
        ValueError: a module without DAU layers. RuntimeError, at the call: a reentrant checkpoint.

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

    Tools that must know what a network does with its layers, whatever its ``forward`` is, need neither hooks,
    which all threads would share, nor a copy. Nothing that belongs to another task may run within it.
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
    """Its forward pass runs without a graph, and what its backward pass calls again cannot know the mode
    of the first call.
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
