"""Checkpoints of train_pst.py and train_vrl.py: safetensors and JSON, written under another name, then renamed; nothing unpickles."""

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import asdict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import fsdp, ranks


def config_digest(config):
    """A digest of what decides PST's numbers."""
    parts = asdict(config)
    return hashlib.sha256(
        json.dumps([parts[k] for k in ("seed", "model", "data", "pst")], sort_keys=True).encode()
    ).hexdigest()[:16]


def trained_parameters(model):
    """Names and tensors that are trained, tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(folder, model, optimizers, state, keep=2):
    """Write trained weights, the optimizers' state and `state` to `folder`; keeps the newest `keep` beside it. All ranks call it, rank 0 writes."""
    weights, moments = (
        {n: fsdp.to_rank_0(p.detach()) for n, p in trained_parameters(model).items()},
        {},
    )
    for n, s in (
        (n, o.state.get(p, {}))
        for o in optimizers
        for g in o.param_groups
        for n, p in zip(g["names"], g["params"])
    ):
        # bitsandbytes counts steps in an int, and all its parameters share one table of 8-bit levels (qmap), which safetensors refuses.
        moments |= {
            f"{n}.{k}": v.clone() if k.startswith("qmap") else fsdp.to_rank_0(torch.as_tensor(v))
            for k, v in s.items()
        }
    if ranks.rank() == 0:
        write_checkpoint(folder, model, weights, moments, state, keep)
    ranks.barrier()


def write_checkpoint(folder, model, weights, moments, state, keep):
    """The files of save_checkpoint."""
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({n: p.contiguous() for n, p in weights.items()}, draft / "model.safetensors")
    if hasattr(model, "peft_config"):  # beside it, the adapter as PEFT and vLLM read it
        model.save_pretrained(draft)
    save_file(moments, draft / "optimizer.safetensors")
    python, numpy = random.getstate(), np.random.get_state()
    rng = {
        "python": [python[0], list(python[1]), python[2]],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
    }
    (draft / "state.json").write_text(json.dumps(dict(state, rng=rng)))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(draft, folder)
    for old in list_checkpoints(folder.parent)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder):
    """Checkpoint folders (stage-I-step-N, step-N) in runs/<name>/pst or runs/<name>/vrl, oldest first."""
    found = [
        (re.fullmatch(r"(?:stage-(\d+)-)?step-(\d+)", p.name), p) for p in folder.glob("*step-*")
    ]
    return [
        p
        for m, p in sorted(
            ((m, p) for m, p in found if m), key=lambda x: [int(g or 0) for g in x[0].groups()]
        )
    ]


def read_checkpoint(config, folder):
    """Weights, moments and state of a checkpoint. SystemExit names the file that is missing or cut off."""
    advice = f"delete the folder {folder} to go on from the one before it"
    read = []
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        path = folder / name
        if not path.is_file():
            raise SystemExit(f"error: {path} is missing, the checkpoint was cut off; {advice}")
        try:
            read.append(
                load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
            )
        except (SafetensorError, ValueError) as e:
            raise SystemExit(
                f"error: {path} cannot be read ({e}), the checkpoint was cut off; {advice}"
            ) from e
    if read[2]["config"] != config_digest(config):
        raise SystemExit(
            f"error: {folder} was written under another config; give this run a name of its own (name=...)"
        )
    return read


def restore(model, optimizers, weights, moments, state):
    """Put a checkpoint back: weights into `model`, moments into `optimizers` (none: weights only), random states."""
    trained = trained_parameters(model)
    if set(trained) != set(weights):
        raise SystemExit(
            f"error: the checkpoint holds other weights than the model trains, such as "
            f"{sorted(set(trained) ^ set(weights))[0]}; give this run a name of its own (name=...)"
        )
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(fsdp.distribute(weights[name], p))
    kept = {}
    for name, value in moments.items():
        n, _, k = name.rpartition(".")
        kept.setdefault(n, {})[k] = (
            int(value)
            if k == "step" and f"{n}.state1" in moments
            else fsdp.distribute(value, trained[n])
        )
    for optimizer in optimizers:
        # There are no moments before the first optimizer step: VRL may start with steps that carry no signal.
        names = [n for g in optimizer.param_groups for n in g["names"]]
        optimizer.load_state_dict(
            {
                "state": {i: kept[n] for i, n in enumerate(names) if n in kept},
                "param_groups": optimizer.state_dict()["param_groups"],
            }
        )
    python, numpy = state["rng"]["python"], state["rng"]["numpy"]
    random.setstate((python[0], tuple(python[1]), python[2]))
    np.random.set_state((numpy[0], np.array(numpy[1], dtype=np.uint32), *numpy[2:]))
    torch.set_rng_state(
        torch.frombuffer(bytearray.fromhex(state["rng"]["torch"]), dtype=torch.uint8)
    )
