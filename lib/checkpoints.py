"""Checkpoints of train_pst.py and train_vrl.py: what is trained, the optimizers' state, the seeds.

Files are safetensors and JSON, so nothing unpickles. A folder is written under another name, then
renamed: it is there whole or not at all.
"""

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib import fsdp, ranks
from lib.experiment import Config
from lib.quantize import moment_to_save, moments_to_load

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def config_digest(config: Config) -> str:
    """A digest of what decides PST's numbers."""
    sections = asdict(config)
    decisive = [sections[name] for name in ("seed", "model", "data", "pst")]
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Names and tensors that are trained, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------------
# Writing
def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict,
    keep: int = 2,
) -> None:
    """Write trained weights, the optimizers' state and `state` (JSON) to `folder`.

    Of the checkpoints beside it the newest `keep` stay. All ranks call it, rank 0 writes.
    """
    weights = {}
    for name, parameter in trained_parameters(model).items():
        weights[name] = fsdp.to_rank_0(parameter.detach())
    moments = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                for key, value in optimizer.state.get(parameter, {}).items():
                    moments[f"{name}.{key}"] = moment_to_save(key, value)
    if ranks.rank() == 0:
        write_checkpoint(folder, model, weights, moments, state)
        for old in list_checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def write_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: dict,
) -> None:
    """The files of `save_checkpoint`; an adapter is written as PEFT and vLLM read it as well."""
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, draft / "model.safetensors")
    if hasattr(model, "peft_config"):
        model.save_pretrained(draft)
        sort_targets(draft / "adapter_config.json")
    save_file(moments, draft / "optimizer.safetensors")
    state = dict(state, rng=random_states())
    (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
    # Renamed, not removed where it stands: a break in the middle would leave half of it.
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(draft, folder)
    shutil.rmtree(old, ignore_errors=True)


def sort_targets(path: Path) -> None:
    """Put an adapter's layers into one order; PEFT writes a set, which has another in each run."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def random_states() -> dict:
    """The states of Python's, NumPy's and torch's random generators, as JSON takes them."""
    version, numbers, gauss = random.getstate()
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [algorithm, keys.tolist(), *rest],
    }


# --------------------------------------------------------------------------------------------------
# Reading
def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders (stage-I-step-N, step-N) in runs/<name>/pst or /vrl, oldest first."""
    numbered = []
    for path in folder.glob("*step-*"):
        match = re.fullmatch(r"(?:stage-(\d+)-)?step-(\d+)", path.name)
        if match:
            stage, step = (int(number or 0) for number in match.groups())
            numbered.append((stage, step, path))
    return [path for stage, step, path in sorted(numbered)]


def read_checkpoint(
    config: Config, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Weights, moments and state of a checkpoint.

    SystemExit names the file that is missing or cut off, or says that it is another config's.
    """
    weights, moments, state = (read_file(folder, name) for name in FILES)
    if state["config"] != config_digest(config):
        raise SystemExit(
            f"error: {folder} was written under another config; "
            f"give this run a name of its own (name=...)"
        )
    return weights, moments, state


def read_file(folder: Path, name: str) -> dict:
    """One file of a checkpoint. SystemExit if it is missing or cut off."""
    path = folder / name
    advice = f"delete the folder {folder} to go on from the one before it"
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing, the checkpoint was cut off; {advice}")
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else json.loads(path.read_text(encoding="utf-8"))
        )
    except (SafetensorError, ValueError) as e:
        raise SystemExit(
            f"error: {path} cannot be read ({e}), the checkpoint was cut off; {advice}"
        ) from e


def restore(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: dict,
) -> None:
    """Put a checkpoint back: weights, moments (no optimizers: weights only), random states.

    SystemExit if it holds other weights than the model trains.
    """
    trained = trained_parameters(model)
    if set(trained) != set(weights):
        raise SystemExit(
            f"error: the checkpoint holds other weights than the model trains, such as "
            f"{sorted(set(trained) ^ set(weights))[0]}; give this run a name of its own (name=...)"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(fsdp.distribute(weights[name], parameter))
    restore_moments(trained, optimizers, moments)
    restore_random_states(state["rng"])


def restore_moments(
    trained: dict[str, torch.nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    moments: dict[str, Tensor],
) -> None:
    """Put moments, named PARAMETER.ENTRY, back into the optimizers."""
    saved = {}
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition(".")
        saved.setdefault(name, {})[key] = value
    loaded = {name: moments_to_load(saved[name], trained[name]) for name in saved}
    for optimizer in optimizers:
        groups = optimizer.state_dict()["param_groups"]
        names = [name for group in optimizer.param_groups for name in group["names"]]
        # Before the first optimizer step there are no moments: VRL may start with steps that carry
        # no signal.
        states = {i: loaded[name] for i, name in enumerate(names) if name in loaded}
        optimizer.load_state_dict({"state": states, "param_groups": groups})


def restore_random_states(states: dict) -> None:
    """Put back what `random_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    algorithm, keys, *rest = states["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch_bytes = bytearray.fromhex(states["torch"])
    torch.set_rng_state(torch.frombuffer(torch_bytes, dtype=torch.uint8))
