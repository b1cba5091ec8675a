"""The process group of torchrun's current attempt, which also works for restarted workers.

torchrun has one key-value store for all attempts. A restarted worker that joined as Lightning does would find
the addresses of ended workers in it, and would fail or wait, depending on which process comes first.
Therefore the workers agree on a name for the attempt, which becomes the prefix of the process group's keys.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import TYPE_CHECKING

from coda_fast.train.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store


def join_attempt(backend: str) -> None:
    """Initialise torch's process group from the environment variables that torchrun sets."""
    from torch.distributed import PrefixStore, TCPStore, init_process_group

    environment = os.environ
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False)
    name = agree_on_attempt(PrefixStore("coda_fast", store), rank, world_size)
    init_process_group(
        backend, store=PrefixStore(f"coda_fast/{name}", store), rank=rank, world_size=world_size
    )


def agree_on_attempt(store: Store, rank: int, world_size: int, patience: float = 300.0) -> str:
    """A name for the attempt, the same for all of its workers and unknown to workers of earlier attempts.

    torchrun has no such name, because each agent counts its own restarts. But the workers of an attempt start
    after all earlier ones have ended. So each worker writes a random name of its own. Rank zero offers a name
    for the attempt, together with the list of the workers' names that it has read, and a worker that finds
    its own name in the list agrees. If the list contains ended workers, rank zero makes a new offer as soon
    as their successors have written their names.

    Raises:
        TrainingError: not all workers agree within ``patience`` seconds.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + patience
    store.set(f"here/{rank}", own)
    here, offer, seen = [f"here/{r}" for r in range(world_size)], "", [""]
    while time.monotonic() < deadline:
        if rank == 0 and store.check(here):
            found = [name.decode() for name in store.multi_get(here)]
            if found != seen:
                seen, offer = found, uuid.uuid4().hex
                store.set("offer", json.dumps([offer, seen]))
            if store.check([f"{offer}/yes/{r}" for r in range(1, world_size)]):
                store.set(f"{offer}/go", "1")
                return offer
        elif rank and store.check(["offer"]):
            current, names = json.loads(store.get("offer"))
            if rank < len(names) and names[rank] == own and current != offer:
                offer = current
                store.set(f"{offer}/yes/{rank}", "1")
            if offer and store.check([f"{offer}/go"]):
                return offer
        time.sleep(0.1)
    raise TrainingError(
        f"torchrun: expected {world_size} workers to meet within {patience:.0f} s, worker {rank} has not met "
        "the others"
    )
