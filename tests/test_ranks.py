"""Several ranks: 2 and 4 gloo processes against one with the same global batch, FSDP, ranks that
die, a whole run.

pytest starts this file under torchrun or accelerate as `tests/test_ranks.py WHAT FOLDER`; what each
rank does then is below "One rank".
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from lib import attention, checkpoints, fsdp, ranks  # noqa: E402
from lib.policy import add_lora  # noqa: E402

if __name__ != "__main__":
    import test_pst  # noqa: E402

    run = test_pst.run  # its fixture: a run folder with data

BIN = Path(sys.executable).parent
SELF = "tests/test_ranks.py"
TRAIN = ("train_vrl.py", "--config", "configs/smoke.yaml", "device=cpu")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
UPDATES = {
    "token": ({"minibatches": 1}, 8),  # name: (section vrl, rollouts)
    "sequence": ({"minibatches": 2, "loss_mean": "sequence", "kl_coef": 0.2}, 8),
    "bounded": ({"minibatches": 2, "micro_tokens": 1, "kl_coef": 0.2}, 7),
    "few": ({"minibatches": 2}, 3),
    "none": ({}, 0),
}
PST = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "lora": {"tune": "lora"},
    "fsdp": {},
    "loaded": {},
}  # name: section pst; loaded: FSDP from a folder


def launch(n, *command, fsdp=False, timeout=200):
    """Run a script with n ranks: CompletedProcess with .seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    how = ["torchrun", "--nproc_per_node", str(n), "--master_port", port]
    if fsdp:
        how = [
            "accelerate",
            "launch",
            "--config_file",
            "configs/fsdp.yaml",
            "--num_processes",
            str(n),
            "--main_process_port",
            port,
        ]
    began = time.time()
    done = subprocess.run(
        [BIN / how[0], *how[1:], *map(str, command)],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    done.seconds = time.time() - began
    return done


# --------------------------------------------------------------------------------------------------
# One rank


def small_policy():
    """A LoRA policy of 2 layers, 32 wide, whose adapter is away from zero."""
    import test_vrl
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = test_vrl.settings()
    shape = Qwen3Config(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=attention.attention_name(config, torch.device("cpu")),
    )
    policy = add_lora(config, Qwen3ForCausalLM(shape), norm=True)
    test_vrl.move(policy, 0.1)
    return policy


def updates(folder):
    """Two GRPO updates of each of UPDATES on given rollouts; rank 0 writes figures and weights."""
    import test_vrl

    import train_vrl

    for name, (vrl, n) in UPDATES.items():
        policy = small_policy()
        config = test_vrl.settings(vrl={"max_grad_norm": 0.5, "lr": 1e-3, **vrl})
        rollouts, figures = test_vrl.made_rollouts(policy, n), []
        optimizer = train_vrl.make_optimizer(policy, config.vrl)
        for _ in range(2):
            figures.append(train_vrl.update(policy, optimizer, rollouts, config))
        mine = torch.cat(
            [p.detach().flatten() for p in checkpoints.trained_parameters(policy).values()]
        )
        assert all(torch.equal(mine, other) for other in ranks.gather([mine])), (
            "ranks have drifted apart"
        )
        if ranks.rank() == 0:
            save_file(
                {
                    k: p.detach().contiguous()
                    for k, p in checkpoints.trained_parameters(policy).items()
                },
                folder / f"{name}.safetensors",
            )
            (folder / f"{name}.json").write_text(json.dumps(figures))


def pst(folder, cases):
    """PST of folder/data by each of `cases`."""
    for name in cases:
        with pytest.MonkeyPatch.context() as patch:
            pst_in_two_parts(folder, name, patch)


def pst_in_two_parts(folder, name, patch):
    """PST with 3 rows a step, stopped by a Ctrl-C that reaches the last rank alone, and gone on
    with; rank 0 writes."""
    import test_pst

    import train_pst as P
    from lib.experiment import Stage

    backward, shard = P.backward_step, fsdp.shard
    sharded, calls = [], []
    patch.setattr(P, "ensure_data", lambda config, run: None)
    patch.setattr(P, "LOG_EVERY", 1)
    patch.setenv("ACCELERATE_USE_FSDP", str(name in ("fsdp", "loaded")).lower())
    patch.setattr(fsdp, "shard", lambda *arguments: (sharded.append(1), shard(*arguments)))
    run = folder / name
    ranks.first(lambda: run.exists() or shutil.copytree(folder / "data", run / "data"))
    config = test_pst.tiny_config(
        rows_per_step=3,
        save_every=2,
        stages=[Stage(0.5, 3, 1e-3), Stage(0.2, 3, 1e-3)],
        **PST[name],
    )
    if name == "loaded":
        config = replace(config, model=replace(config.model, path=str(folder / "start")))

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3 and ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(*arguments)

    patch.setattr(P, "backward_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        P.train_pst(config, run)
    assert stopped.value.code == 130
    assert checkpoints.list_checkpoints(run / "pst")[-1].name == "stage-1-step-2"
    patch.setattr(P, "backward_step", backward)
    P.train_pst(config, run)
    assert bool(sharded) == (name in ("fsdp", "loaded") and ranks.world() > 1)


def part_dies(folder):
    """Rank 1 ends in some way while rank 0 waits for it in a collective operation."""
    if ranks.rank() == 0:
        return ranks.barrier()
    how = (folder / "how").read_text()
    if how == "raises":
        raise ValueError("rank 1 breaks")
    if how == "ends":
        raise SystemExit("error: of rank 1")
    time.sleep(600)


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "part_dies":
        return part_dies(folder)
    updates(folder)
    pst(folder, sys.argv[3:])


# --------------------------------------------------------------------------------------------------
# Equal to one process


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run):
    """What one process makes of UPDATES and PST."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(run / "data", folder / "data")
    updates(folder)
    pst(folder, [name for name in PST if name != "loaded"])
    shutil.copytree(folder / "adamw" / "pst" / "final", folder / "start")
    pst(folder, ["loaded"])
    return folder


def same_weights(one, other, what, tolerance=1e-5):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    worst = max(float((one[k] - other[k]).abs().max()) for k in one)
    assert worst <= tolerance, f"{what}: weights differ by {worst:.1e}"


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("phase", "tok_s")} for m in lines]


def compare_pst(alone, folder, name):
    # torch's Muon works in bfloat16: the gradients' last bits move its steps by 2^-8 of themselves.
    rounding = name == "muon"
    same_weights(
        *(f / name / "pst/final/model.safetensors" for f in (alone, folder)),
        name,
        5e-4 if rounding else 1e-5,
    )
    one, other = metrics(alone / name), metrics(folder / name)
    assert len(one) == len(other) > 4
    for a, b in zip(one, other):
        assert b == pytest.approx(a, abs=1e-3 if rounding else 1e-5, rel=1e-3 if rounding else 1e-5)


@pytest.mark.parametrize("n, cases", [(2, [*PST]), (4, ["adamw"])], ids=["2", "4"])
def test_ranks_equal_one_process(alone, run, tmp_path, n, cases):
    for name in ("data", "start"):
        shutil.copytree(alone / name, tmp_path / name)
    done = launch(n, SELF, "all", tmp_path, *cases, fsdp="fsdp" in cases)
    assert done.returncode == 0, done.stderr
    for name in UPDATES:
        same_weights(alone / f"{name}.safetensors", tmp_path / f"{name}.safetensors", name)
        for a, b in zip(*(json.loads((f / f"{name}.json").read_text()) for f in (alone, tmp_path))):
            assert b.keys() == a.keys() and a["kl"] is None or b["kl"] is not None
            for k in a.keys() - {"read_tokens"}:  # padding is among the tokens read
                assert b[k] == (a[k] and pytest.approx(a[k], abs=1e-5, rel=1e-4)), (name, k)
            assert a["trained"] == UPDATES[name][1] and (a["grad_norm"] > 1e-3 or not a["trained"])
    for name in cases:
        compare_pst(alone, tmp_path, name)
        for file in (
            "model",
            "optimizer",
        ):  # whole tensors under FSDP too, which any number of ranks goes on from
            one, other = (
                load_file(f / name / f"pst/stage-2-step-2/{file}.safetensors")
                for f in (alone, tmp_path)
            )
            assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}


# --------------------------------------------------------------------------------------------------
# Ends


@pytest.mark.parametrize("how", ["raises", "ends", "hangs"])
def test_a_rank_that_dies_ends_the_run(tmp_path, how):
    (tmp_path / "how").write_text(how)
    done = launch(2, SELF, "part_dies", tmp_path)
    assert done.returncode != 0 and done.seconds < 60
    if how == "raises":
        assert (
            "Traceback" in done.stderr
            and "ValueError: rank 1 breaks" in done.stderr
            and "in part_dies" in done.stderr
        )
    if how == "ends":
        assert done.stderr.count("error: of rank 1") == 1
    if how == "hangs":
        assert "in barrier" in done.stderr  # rank 0 gave up waiting


def test_a_bad_config_is_said_once():
    done = launch(2, *TRAIN, "name=test-no", "vrl.step=3")
    assert done.returncode != 0 and done.stderr.count("error: unknown config key `vrl.step`") == 1


# --------------------------------------------------------------------------------------------------
# A whole run


def test_a_whole_run_with_two_ranks():
    name = f"test-{uuid.uuid4().hex[:8]}"
    run = ROOT / "runs" / name
    try:
        done = launch(
            2,
            *TRAIN,
            f"name={name}",
            "model.base_examples=40",
            "data.queries=42",
            "data.general=60",
            "data.general_heldout=8",
            "data.train_tasks=42",
            "data.heldout_tasks=3",
            "vrl.steps=2",
            "vrl.tasks_per_step=3",
            "rollout.max_turn_tokens=32",
            "pst.stages=[{general: 0.5, repeat: 1}, {general: 0.2, repeat: 1}]",
        )
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.count("PST + VRL") == 1
            and done.stdout.count("VRL: steps 0 to 2, 3 tasks x 4 rollouts = 12 a step") == 1
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [m["step"] for m in lines if m["phase"] == "vrl"] == [1, 2] and [
            m["step"] for m in lines if m["phase"] == "eval"
        ] == [0, 2]
        for m in lines:
            if m["phase"] == "vrl":
                assert m["groups"]["groups"] == 3 and sum(m["ended"].values()) == 12
                rollouts = [
                    json.loads(line)
                    for line in (run / f"vrl/rollouts/step-{m['step']}.jsonl")
                    .read_text()
                    .splitlines()
                ]
                assert m["reward"] == pytest.approx(
                    sum(r["reward"]["total"] for r in rollouts) / 12
                )
                order = [r["task"]["id"] for r in rollouts]
                assert [order[4 * g : 4 * g + 4] for g in range(3)] == [
                    [order[4 * g]] * 4 for g in range(3)
                ] and len(set(order)) == 3
        assert (
            sum(json.loads((run / "vrl/before.json").read_text())["greedy"]["ended"].values()) == 3
        )
        from lib.experiment import load_config
        from lib.runs import read_jsonl
        from train_vrl import step_tasks

        config = load_config(ROOT / "configs/smoke.yaml", ["vrl.tasks_per_step=3"])
        assert order == [
            t["id"]
            for t in step_tasks(read_jsonl(run / "data/train.jsonl"), config, 1)
            for _ in range(4)
        ]
        assert (
            (run / "curve.png").is_file()
            and (run / "trajectory.txt").is_file()
            and not list(run.rglob("*.tmp"))
        )
    finally:
        shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "part_dies" and (Path(sys.argv[2]) / "how").read_text() == "hangs":
        ranks.TIMEOUT = timedelta(seconds=10)
    ranks.run(main)
    if not {"fsdp", "loaded"} & set(sys.argv):  # FSDP's own caches hold on to the group
        threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in threads if "gloo" in name], (
            f"a thread that outlives its group can abort the process as Python ends: {threads}"
        )
