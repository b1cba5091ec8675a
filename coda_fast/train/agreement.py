"""Communication between the processes of a run, over Lightning Fabric's process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from coda_fast.data.errors import DataError
from coda_fast.data.sources import Process
from coda_fast.train.errors import TrainingError
from coda_fast.train.state import State

if TYPE_CHECKING:
    from lightning.fabric import Fabric

HEARTBEAT = 2.0  # approximate seconds between messages, so that a stop signal need not wait for a logged step


class Agreement:
    """A process of a run, which can agree with the others. All processes must call every method."""

    def __init__(self, fabric: Fabric, state: State):
        self.fabric, self.state = fabric, state
        self.process = Process(fabric.global_rank, fabric.world_size)
        self.is_rank_zero = fabric.is_global_zero

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` in rank zero, and return its result in all processes.

        Raises:
            TrainingError: in all processes, with the message of the error that ``work`` raised.
        """
        result = failure = None
        if self.is_rank_zero:
            try:
                result = work()
            except (TrainingError, DataError) as error:
                failure = str(error)
            except OSError as error:
                failure = f"{error}; {self.state.last_good_in_words()}"
        result, failure = self.fabric.broadcast((result, failure))
        if failure is not None:
            raise TrainingError(failure)
        return result

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Each number, summed over the processes."""
        return self.fabric.all_reduce(numbers, reduce_op="sum")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return float(self.sum(torch.tensor(float(flag), device=self.fabric.device))) > 0

    def share_buffers(self, module: torch.nn.Module) -> None:
        """Give every process the buffers of rank zero: in training, each process has statistics of batch
        normalisation of its own images alone, and checkpoints hold those of rank zero.
        """
        if self.process.world_size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def gather(self, value: Any) -> list:
        """The value of each process, in the order of ranks. Fabric itself gathers tensors only."""
        if self.process.world_size == 1:
            return [value]
        gathered = [None] * self.process.world_size
        distributed.all_gather_object(gathered, value)
        return gathered


class Heartbeat:
    """Decides after how many steps the processes exchange their next message: as many as take about
    ``HEARTBEAT`` seconds by the clock of rank zero, the same number in all processes.
    """

    def __init__(self):
        self.interval, self.passed, self.last = 1, 0, time.perf_counter()

    def is_due(self) -> bool:
        """Count a step, and return whether a message is due after it."""
        self.passed += 1
        return self.passed >= self.interval

    def waited(self) -> float:
        """Seconds since the last message."""
        return time.perf_counter() - self.last

    def restart(self, waited: float) -> None:
        """Start counting again after a message, which came ``waited`` seconds after the last one by the clock
        of rank zero.
        """
        self.interval = max(1, int(HEARTBEAT * self.passed / max(waited, 1e-9)))
        self.passed, self.last = 0, time.perf_counter()
