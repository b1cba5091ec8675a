"""Processes: Lightning Fabric by the recipe, what torchrun and SLURM say, FSDP2's groups of parameters."""

from __future__ import annotations

import json
import os
import time
import uuid

import torch

from coda_fast.train.errors import TrainingError, need


def fabric(recipe):
    """Lightning Fabric by the recipe; what torchrun or SLURM say about nodes and processes goes first."""
    Fabric = need("lightning.fabric").Fabric
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    environment = os.environ
    devices, nodes = recipe.devices, 1
    if "LOCAL_WORLD_SIZE" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment["WORLD_SIZE"]) // devices
    elif SLURMEnvironment.detect():  # by srun: in a shell of salloc the recipe counts
        nodes = int(environment["SLURM_NNODES"])
        devices = int(environment["SLURM_NTASKS"]) // nodes
    accelerator = recipe.accelerator
    if accelerator == "auto":
        accelerator = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainingError("accelerator: expected a CUDA GPU for accelerator=cuda, found none")
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "cuda" else 1
    if (
        accelerator == "cpu"
        and "LOCAL_WORLD_SIZE" not in environment
        and devices > (most := max(16, os.cpu_count() or 1))
    ):
        raise TrainingError(
            f"devices: expected at most {most} processes on this machine's processors, got {devices}"
        )
    world = devices * nodes
    strategy = "auto"
    if recipe.strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            lambda module, mesh: shard(module, mesh),
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    elif world > 1 or recipe.strategy == "ddp":
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    if world > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _join_attempt("nccl" if accelerator == "cuda" else "gloo")
    try:
        return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
    except Exception as error:  # Lightning raises several kinds for devices that are not there
        raise TrainingError(f"accelerator {accelerator}, devices {devices}: {error}") from None


def shard(objective, mesh):
    """FSDP2: a group of parameters for each layer; one for all with the matrix regulariser, which uses
    weights outside their layer.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    if objective.matrix is None:
        for layer in objective.model.layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(objective, mesh=mesh)


def sharded(fabric) -> bool:
    """Whether parameters are sharded, so that a forward pass is collective."""
    return type(fabric.strategy).__name__ == "ModelParallelStrategy"


def lost_touch(error: Exception) -> str | None:
    """In one line, what a process sees of others that ended, or that it does not find. None: it is
    something else.
    """
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "/gloo/" in text:
        return text[:200]
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return text[:800] or type(error).__name__  # NCCL says why at the end
    return None


def report(error: Exception) -> None:
    """Tell torchrun why this process ends, for its summary."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error.with_traceback(
            error.__traceback__ if not isinstance(error, (TrainingError, OSError)) else None
        )
    except type(error):
        get_error_handler().record_exception(error)


def _join_attempt(backend):
    """The process group of torchrun's present attempt. Its agent keeps one store for all of them, where a
    worker that was started again would find the addresses of its dead predecessors and fail, or wait,
    depending on who comes first.
    """
    from torch.distributed import PrefixStore, TCPStore, init_process_group

    environment = os.environ
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), world, is_master=False)
    name = agree_on_attempt(PrefixStore("coda_fast", store), rank, world)
    init_process_group(backend, store=PrefixStore(f"coda_fast/{name}", store), rank=rank, world_size=world)


def agree_on_attempt(store, rank: int, world: int, patience: float = 300.0) -> str:
    """A name that all workers of an attempt agree on, and none of an earlier attempt.

    torchrun has none to give: each agent counts its own restarts. But workers of an attempt start after all
    earlier ones have ended. So each leaves a random name, the first one offers a name of its own with the
    list of those that it saw, and who finds itself in the list agrees. A list that names the dead is offered
    anew as soon as their successors have come.

    Raises:
        TrainingError: not all came within ``patience`` seconds.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + patience
    store.set(f"here/{rank}", mine)
    here, offer, seen = [f"here/{r}" for r in range(world)], None, None
    while time.monotonic() < deadline:
        if rank == 0 and store.check(here):
            found = [name.decode() for name in store.multi_get(here)]
            if found != seen:
                seen, offer = found, uuid.uuid4().hex
                store.set("offer", json.dumps([offer, seen]))
            if store.check([f"{offer}/yes/{r}" for r in range(1, world)]):
                store.set(f"{offer}/go", "1")
                return offer
        elif rank and store.check(["offer"]):
            current, names = json.loads(store.get("offer"))
            if rank < len(names) and names[rank] == mine and current != offer:
                offer = current
                store.set(f"{offer}/yes/{rank}", "1")
            if offer is not None and store.check([f"{offer}/go"]):
                return offer
        time.sleep(0.1)
    raise TrainingError(
        f"torchrun: expected {world} workers to meet within {patience:.0f} s, worker {rank} has not met the "
        "others"
    )
