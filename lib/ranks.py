"""Several ranks on one node, a process each: who this one is, and what they do together.

In one process nothing of this happens. The first line is for GPUs (nccl for their tensors, gloo for
Python objects), the second for CPUs (gloo):

    accelerate launch --num_processes 8 train_vrl.py --config ...
    torchrun --nproc_per_node 2 train_vrl.py --config ... device=cpu

The launcher ends all ranks once one has died. A collective operation is one that every rank must
come to; who comes alone waits for TIMEOUT.
"""

import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from lib.runs import run_command

# A rank whose partner hangs ends with an error after so long; longer than the slowest rank's
# rollouts of one step.
TIMEOUT = timedelta(hours=1)
# Gradients that are added up in one go, 512 MB in fp32: an adapter whole, all weights in a few
# parts.
BUCKET = 2**27

STORE = None  # the launcher's key-value store, while there are several ranks
TURNS = itertools.count()  # numbers the calls of `first`, the same on every rank

Made = TypeVar("Made")


# --------------------------------------------------------------------------------------------------
# Beginning and end
def run(main: Callable[[], Made]) -> Made | None:
    """Call main() as this rank, by run_command.

    An error line that several ranks end with is said once; a traceback also goes into the
    launcher's last report.
    """
    global STORE
    start()
    if world() == 1:
        return run_command(main)
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(partial(run_command, main))()
    except SystemExit as e:
        if isinstance(e.code, str):
            if STORE.add(f"said: {e.code}", 1) == 1:
                print(e.code, file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        raise
    # Leave together: gloo's threads abort a rank that exits while another still talks to it.
    barrier()
    if "vllm" not in sys.modules:  # which takes the group down itself as the process ends
        dist.destroy_process_group()
    STORE = None
    # What FSDP and vLLM still hold of the group has threads, and one that lets go of its last
    # tensor while Python ends aborts the process.
    time.sleep(0.1)


def start() -> None:
    """Join the other ranks, if a launcher started several (it sets RANK and WORLD_SIZE).

    Ranks above 0 print nothing from here on.
    """
    global STORE
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
        return
    # Its functions take the group that there is at their import as their default. Imported later,
    # they would hold it beyond run().
    importlib.import_module("torch.distributed.nn")

    STORE, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=STORE, rank=number, world_size=count, timeout=TIMEOUT)
    if number:
        sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# Who this is
def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This rank's part of a list that all ranks have: every world()-th item."""
    return items[rank() :: world()]


# --------------------------------------------------------------------------------------------------
# Together
def gather(items: list) -> list:
    """The lists of all ranks as one, rank by rank, on every rank. Collective."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(number: float) -> float:
    """Sum of a number over all ranks, the same on each of them. Collective."""
    if world() == 1:
        return number
    out = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(out)
    return out.item()


def agreed(value: Made) -> Made:
    """What rank 0 says, such as whether a file is there. Collective.

    Others may look later, when it has changed.
    """
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here. Collective."""
    total(0)


def first(make: Callable[[], Made]) -> Made:
    """make() on rank 0, then, once that is done, on the others, which find its files. Collective.

    The others wait however long it takes (a week): data may come from the hub.
    """
    turn = f"turn {next(TURNS)}"
    if rank():
        STORE.wait([turn], timedelta(days=7))
    made = make()
    if world() > 1 and not rank():
        STORE.set(turn, "done")
    return made


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up every parameter's gradient over all ranks, in place. Collective.

    A rank without one counts as zeros. Parameters that FSDP spread over the ranks have been added
    up in the backward pass.
    """
    parameters = list(parameters)
    if world() == 1 or hasattr(parameters[0], "full_tensor"):
        return
    for bucket in buckets(parameters):
        # Flat, because a call a tensor takes thirty times as long.
        flat = torch.cat([flat_gradient(p) for p in bucket])
        dist.all_reduce(flat)
        sums = flat.split([p.numel() for p in bucket])
        for p, grad in zip(bucket, sums):
            p.grad = grad.view_as(p).to(p.dtype)


def buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters in runs of at most BUCKET numbers; a larger one stands alone."""
    runs, size = [], 0
    for p in parameters:
        if not runs or size + p.numel() > BUCKET:
            runs.append([])
            size = 0
        runs[-1].append(p)
        size += p.numel()
    return runs


def flat_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter's gradient, flat and in fp32; zeros where it has none."""
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), device=parameter.device)
    return parameter.grad.flatten().float()
