"""Processes and devices: Lightning Fabric, configured by the recipe and the environment of torchrun or SLURM,
the parameter groups of FSDP2, and errors caused by the end of other processes.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import distributed

from coda_fast.train import rendezvous
from coda_fast.train.errors import TrainingError, need
from coda_fast.train.schema import Recipe

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh

    from coda_fast.train.objective import Objective


# Environment variables by which Lightning tells the processes that it starts about each other.
_SET_BY_LIGHTNING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@contextlib.contextmanager
def left_as_found() -> Iterator[None]:
    """A context at whose end process groups are destroyed and Lightning's environment variables are as they
    were before. Another run by the same program, or by a process that it starts, would otherwise take itself
    for a part of this one: it would wait for processes that nobody starts, at a port that is in use.
    """
    before = {name: os.environ.get(name) for name in _SET_BY_LIGHTNING}
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            # Sharded modules refer to the process groups. They are freed before the groups are destroyed,
            # because the threads of groups that still exist when the process ends abort it.
            gc.collect()
            distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_fabric(recipe: Recipe) -> Fabric:
    """Lightning Fabric for the recipe, not yet launched. The numbers of nodes and processes of torchrun or
    SLURM take precedence over the recipe.

    Raises:
        TrainingError: the recipe asks for devices that this machine does not have.
    """
    fabric = need("lightning.fabric")
    accelerator = _accelerator(recipe)
    devices, nodes = _devices_and_nodes(recipe, accelerator)
    world_size = devices * nodes
    if world_size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rendezvous.join_attempt("nccl" if accelerator == "cuda" else "gloo")
    try:
        return fabric.Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(recipe.strategy, world_size),
        )
    except Exception as error:  # Lightning raises errors of several classes for missing devices
        raise TrainingError(f"accelerator {accelerator}, devices {devices}: {error}") from None


def _accelerator(recipe):
    if recipe.accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainingError("accelerator: expected a CUDA GPU for accelerator=cuda, found none")
    if recipe.accelerator != "auto":
        return recipe.accelerator
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _devices_and_nodes(recipe, accelerator):
    """The number of processes on each node, and the number of nodes. Fabric detects the launcher, but expects
    the same numbers as arguments.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    environment = os.environ
    devices, nodes = recipe.devices, 1
    if "LOCAL_WORLD_SIZE" in environment:  # torchrun
        devices = int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment["WORLD_SIZE"]) // devices
    elif SLURMEnvironment.detect():  # started by srun; in a shell of salloc the recipe decides
        nodes = int(environment["SLURM_NNODES"])
        devices = int(environment["SLURM_NTASKS"]) // nodes
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "cuda" else 1
    most = max(16, os.cpu_count() or 1)
    if accelerator == "cpu" and "LOCAL_WORLD_SIZE" not in environment and devices > most:
        raise TrainingError(
            f"devices: expected at most {most} processes on this machine's processors, got {devices}"
        )
    # Lightning starts a further process by starting the program again, from its first run.
    if (rank := int(environment.get("LOCAL_RANK", 0))) >= devices:
        raise TrainingError(
            f"LOCAL_RANK: expected a number below that of the processes, {devices}, got {rank}; give "
            "each run a program of its own, as every process begins with the first run of its program"
        )
    return devices, nodes


def _strategy(name, world_size):
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    if name == "fsdp2":
        return ModelParallelStrategy(
            shard, data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if world_size > 1 or name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def shard(objective: Objective, device_mesh: DeviceMesh) -> Objective:
    """Shard an objective with FSDP2, in place, with one parameter group for each layer. With the matrix
    regulariser, which uses weights outside their layer's forward pass, there is a single group.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = device_mesh["data_parallel"]
    if objective.matrix is None:
        for layer in objective.model.dau_layers().values():
            fully_shard(layer, mesh=mesh)
    return fully_shard(objective, mesh=mesh)


def is_sharded(fabric: Fabric) -> bool:
    """Whether parameters are sharded, so that all processes must take part in a forward pass."""
    return type(fabric.strategy).__name__ == "ModelParallelStrategy"


def lost_connection(error: Exception) -> str | None:
    """The message, in one line, of an error that occurs because other processes have ended or cannot be
    found; None for any other error.
    """
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "/gloo/" in text:
        return text[:200]
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return text[:800] or type(error).__name__  # long, because NCCL puts the reason at the end
    return None


def report(error: Exception) -> None:
    """Tell torchrun why this process ends, for its summary. torch's decorator ``record`` would also report
    processes that merely lost the connection to this one.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        expected = isinstance(error, (TrainingError, OSError))
        raise error.with_traceback(None if expected else error.__traceback__)
    except type(error):
        get_error_handler().record_exception(error)
