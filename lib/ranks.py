"""Several ranks on one node, a process each: who this one is, and the few things that they do together. In one process nothing of this happens.

    accelerate launch --num_processes 8 train_vrl.py --config ...          # GPUs: nccl for their tensors, gloo for Python objects
    torchrun --nproc_per_node 2 train_vrl.py --config ... device=cpu       # CPUs: gloo

The launcher ends all ranks once one has died. A collective operation is one that every rank must come to; who comes alone waits for TIMEOUT.
"""

import itertools
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(
    hours=1
)  # a rank whose partner hangs ends with an error after so long; longer than the slowest rank's rollouts of one step
BUCKET = (
    2**27
)  # gradients that are added up in one go, 512 MB in fp32: an adapter whole, all weights in a few parts
STORE, TURNS = None, itertools.count()


def start():
    """Join the other ranks, if a launcher started several (it sets RANK and WORLD_SIZE). Ranks above 0 print nothing."""
    global STORE
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
        return
    # Its functions take the group that there is at their import as their default. Imported later, they would hold it beyond run().
    import torch.distributed.nn  # noqa: F401

    STORE, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=STORE, rank=number, world_size=count, timeout=TIMEOUT)
    if number:
        sys.stdout = open(os.devnull, "w")


def run(main):
    """Call main() as this rank. An error line that several ranks end with is said once; a traceback also goes into the launcher's last report."""
    global STORE
    start()
    if world() == 1:
        return main()
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(main)()
    except SystemExit as e:
        if isinstance(e.code, str):
            if STORE.add(f"said: {e.code}", 1) == 1:
                print(e.code, file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        raise
    barrier()  # leave together: gloo's threads abort a rank that exits while another still talks to it
    if "vllm" not in sys.modules:  # which takes the group down itself as the process ends
        dist.destroy_process_group()
    STORE = None
    # What FSDP and vLLM still hold of the group has threads, and one that lets go of its last tensor while Python ends aborts the process.
    time.sleep(0.1)


def rank():
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items):
    """This rank's part of a list that all ranks have: every world()-th item."""
    return items[rank() :: world()]


def gather(items):
    """The lists of all ranks as one, rank by rank, on every rank. Collective."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


def total(number):
    """Sum of a number over all ranks, the same on each of them. Collective."""
    if world() == 1:
        return number
    out = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(out)
    return out.item()


def agreed(value):
    """What rank 0 says, such as whether a file is there: others may look later, when it has changed. Collective."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier():
    """Wait until every rank is here. Collective."""
    total(0)


def first(make):
    """make() on rank 0, then, once that is done, on the others, which find its files. However long it takes: data may come from the hub."""
    turn = f"turn {next(TURNS)}"
    if rank():
        STORE.wait([turn], timedelta(days=7))
    made = make()
    if world() > 1 and not rank():
        STORE.set(turn, "done")
    return made


def sum_gradients(parameters):
    """Add up every parameter's gradient over all ranks, in place; a rank without one counts as zeros. Collective.

    Flat, because a call a tensor takes thirty times as long. Parameters that FSDP spread over the ranks have been added up in the backward pass.
    """
    parameters, at = list(parameters), 0
    if world() == 1 or hasattr(parameters[0], "full_tensor"):
        return
    while at < len(parameters):
        end = at + 1
        while end < len(parameters) and sum(p.numel() for p in parameters[at : end + 1]) <= BUCKET:
            end += 1
        part, at = parameters[at:end], end
        flat = torch.cat(
            [
                torch.zeros(p.numel(), device=p.device)
                if p.grad is None
                else p.grad.flatten().float()
                for p in part
            ]
        )
        dist.all_reduce(flat)
        for p, grad in zip(part, flat.split([p.numel() for p in part])):
            p.grad = grad.view_as(p).to(p.dtype)
