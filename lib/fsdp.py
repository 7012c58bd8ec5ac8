"""FSDP: all weights in training, spread over the ranks with their gradients and AdamW's moments.

All of it stands here; train_pst.py asks for it in three places (`shard_if_asked`, `through_shards`,
`missing_passes`), which change nothing in a run of one process. It is torch's own fully_shard
(FSDP2): accelerate's Accelerator knows FSDP on GPUs alone, and what runs there should be what is
tested on CPUs. "Collective" is what every rank must come to.
"""

import math
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lib.experiment import Config
from lib.ranks import rank, world

SHARDED = "sharded_call"  # the method of a sharded model that runs a function on whole weights


def use_fsdp() -> bool:
    """Whether `accelerate launch --config_file configs/fsdp.yaml` asked for it."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and world() > 1


def shard_if_asked(config: Config, model: torch.nn.Module) -> None:
    """Spread the model's weights over the ranks if the launcher asked for it.

    SystemExit if the config trains something else than all weights by torch's AdamW.
    """
    if not use_fsdp():
        return
    check_sharding(config)
    shard(model)


def check_sharding(config: Config) -> None:
    """SystemExit if FSDP is asked for, and something else is trained than it can spread."""
    if use_fsdp() and (config.pst.tune, config.pst.optimizer) != ("full", "adamw"):
        raise SystemExit(
            f"error: FSDP spreads all weights and AdamW's moments, got pst.tune={config.pst.tune} "
            f"pst.optimizer={config.pst.optimizer}; set pst.tune=full pst.optimizer=adamw, or "
            f"launch without configs/fsdp.yaml"
        )


def shard(model: torch.nn.Module) -> None:
    """Spread a model's weights over the ranks, in place and once.

    The root is wrapped at a method of its own, not at forward: lib.policy.token_logprobs calls
    backbone and head apart. `through_shards` uses that method.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if is_sharded(model):
        return
    mesh = init_device_mesh(model.device.type, (world(),))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    blocks = []
    for name, module in model.named_modules():
        # A vision tower's blocks go with the root: it runs on ranks whose rows have pictures, and
        # a block of its own would wait for all.
        if type(module).__name__ in model._no_split_modules and "visual." not in name:
            blocks.append(module)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    setattr(model, SHARDED, partial(call_with, model))
    register_fsdp_forward_method(model, SHARDED)


def call_with(model: torch.nn.Module, function: Callable, *arguments, **settings) -> Tensor:
    """function(model, ...), whose gradient the ranks add up.

    FSDP takes the mean of the ranks' gradients, a step wants their sum: each rank's is made
    world() times as large.
    """
    result = function(model, *arguments, **settings)
    if result.requires_grad:
        result.register_hook(lambda gradient: gradient * world())
    return result


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has spread the model's weights."""
    return hasattr(model, SHARDED)


def through_shards(function: Callable, model: torch.nn.Module) -> Callable:
    """function(model, ...) as a function of the rest.

    Of a model that is spread over the ranks, with its weights at hand.
    """
    if is_sharded(model):
        return partial(getattr(model, SHARDED), function)
    return partial(function, model)


def missing_passes(n_rows: int, micro_rows: int, done: int) -> int:
    """Passes that this rank must add to its `done` ones of a step of `n_rows` rows over all ranks.

    FSDP's passes are collective: a rank with fewer rows reads one more, without a loss.
    """
    most_rows = math.ceil(n_rows / world())
    return math.ceil(most_rows / micro_rows) - done


# --------------------------------------------------------------------------------------------------
# Whole tensors and parts
def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP spread, put together, on every rank; any other as it is. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def to_rank_0(tensor: Tensor) -> Tensor | None:
    """`full_tensor`, in rank 0's own memory; None on the others. Collective.

    A GPU has no room for all weights and moments at once.
    """
    tensor = full_tensor(tensor)
    return tensor.cpu() if rank() == 0 else None


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor | None]:
    """A sharded model's weights in fp32, in rank 0's memory; None each on others. Collective."""
    weights = {name: to_rank_0(weight.detach()) for name, weight in model.named_parameters()}
    return {name: w if w is None else w.float() for name, w in weights.items()}


def distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """The opposite of `full_tensor`: a tensor that every rank has, spread as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
