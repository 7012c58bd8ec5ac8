"""lib.fsdp."""

import os

from lib.ranks import rank, world


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2: weights, gradients and moments spread over the ranks
def use_fsdp():
    """Whether `accelerate launch --config_file configs/fsdp.yaml` asked for it."""
    return world() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model, name, function):
    """Spread a model's weights over the ranks, in place and once; `model.name(...)` then calls function(model, ...) with them at hand.

    torch's own fully_shard: accelerate's Accelerator knows FSDP on GPUs alone, and what runs there should be what is tested on CPUs. The root is
    wrapped at `function`, not at forward, since train_pst.token_logprobs calls backbone and head apart.
    """
    from functools import partial

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if hasattr(model, name):
        return
    mesh, reshard = (
        init_device_mesh(model.device.type, (world(),)),
        os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
    )
    # A vision tower's blocks go with the root: it runs on ranks whose rows have pictures, and a block of its own would wait for all.
    for block in [
        m
        for n, m in model.named_modules()
        if type(m).__name__ in model._no_split_modules and "visual." not in n
    ]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    setattr(model, name, partial(function, model))
    register_fsdp_forward_method(model, name)


def full_tensor(tensor):
    """A tensor that FSDP spread, put together, on every rank (collective); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def to_rank_0(tensor):
    """`whole`, in rank 0's own memory; None on the others: a GPU has no room for all weights and moments at once. Collective."""
    tensor = full_tensor(tensor)
    return tensor.cpu() if rank() == 0 else None


def distribute(tensor, like):
    """The opposite of `whole`: a tensor that every rank has, spread as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
