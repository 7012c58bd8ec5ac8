"""An experiment: every config key, its default and meaning, and how YAML becomes a Config.

One YAML file describes one experiment: sections of keys, `extends:` for what another file says
already, and `section.key=value` on the command line above both. A key that is not here is an error
that names the nearest one. `python make_data.py --keys` prints them all.

A default that is the paper's says "paper" in its meaning. Every other default is ours, and each
section says so again.
"""

import argparse
import copy
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lib.runs import ROOT

# How R_plan and R_fine's parts make R_vrt (key reward.form).
FORMS = ("plan*fine", "plan*(result+format)", "result+format", "plan+fine")
# The parts of the MDP in which a "real" service may differ from the simulator (lib/dials.py).
DEVIATIONS = ("observation", "action", "transition", "reward")
TRACKERS = ("tensorboard", "wandb", "trackio")


# Upper limit of what is counted: more of anything than a run can hold. It catches slips.
MANY = 10**9
LEAST_RATE = 1e-12  # of learning; below it nothing moves


def key(
    default: Any,
    meaning: str,
    one_of: tuple[str, ...] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A config key: its default, its meaning, and which values it may have.

    A key has the type of its default. A default list, dict or section is copied for each instance.
    The limits of a dict are those of each of its numbers.
    """
    limits = {"one_of": one_of, "at_least": at_least, "at_most": at_most}
    return field(
        default_factory=lambda: copy.deepcopy(default),
        metadata={"doc": meaning, **limits},
    )


def check_values(section) -> None:
    """ValueError for a value that its key does not allow."""
    for f in fields(section):
        value, one_of = getattr(section, f.name), f.metadata["one_of"]
        least, most = f.metadata["at_least"], f.metadata["at_most"]
        for chosen in value if isinstance(value, list) else [value]:
            if one_of is not None and chosen not in one_of:
                raise ValueError(f"{f.name} is {chosen!r}; allowed: {', '.join(one_of)}")
        if value == [] != f.default_factory():
            raise ValueError(f"{f.name} is empty; it must hold at least one entry")
        if least is None:
            continue
        numbers = {f.name: value}
        if isinstance(value, dict):
            numbers = {f"{f.name}.{name}": number for name, number in value.items()}
        for name, number in numbers.items():
            # Written so that NaN fails.
            if not least <= number <= most:
                raise ValueError(
                    f"{name} is {number!r}; it must be at least {least:,} and at most {most:,}"
                )
        if not any(numbers.values()) and isinstance(value, dict):
            raise ValueError(f"{f.name} are all 0; at least one must be above it")


def check_config(config) -> None:
    """`check_values` of the keys outside the sections, and of what only they refuse."""
    if config.device == "mps":
        raise ValueError("device is 'mps', which is not supported; set device=cpu")
    check_values(config)


# --------------------------------------------------------------------------------------------------
# The keys, section by section
@dataclass(frozen=True)
class ModelConfig:
    """The policy: a Qwen3 from scratch (the tiny configs) or a pretrained model (`path`).

    The paper's are Qwen3-VL-8B-Thinking and Qwen3-VL-32B-Thinking; all defaults here are ours.
    """

    path: str = key(
        "",
        "folder or hub name of a pretrained model; empty: a Qwen3 from scratch, with these sizes",
    )
    vocab_size: int = key(
        1536,
        "byte-level BPE tokens, tags and control tokens included (from scratch only)",
        at_least=300,
        at_most=10**6,
    )
    hidden_size: int = key(160, "width (from scratch only)", at_least=1, at_most=10**5)
    intermediate_size: int = key(
        480, "width inside the MLP (from scratch only)", at_least=1, at_most=10**6
    )
    layers: int = key(4, "transformer blocks (from scratch only)", at_least=1, at_most=1000)
    heads: int = key(5, "query heads (from scratch only)", at_least=1, at_most=1000)
    kv_heads: int = key(5, "key/value heads (from scratch only)", at_least=1, at_most=1000)
    head_dim: int = key(32, "size of one head (from scratch only)", at_least=2, at_most=1024)
    base_examples: int = key(
        0,
        "copying exercises that a policy from scratch is trained on first: they stand for the "
        "pretrained model of the paper; 0: none, its weights stay random",
        at_least=0,
        at_most=MANY,
    )
    base_general: int = key(
        0,
        "general examples after them, of data.general_kinds: with `reading` among these it learns "
        "what a request asks for, and never a plan or a call of the tools; 0: none",
        at_least=0,
        at_most=MANY,
    )
    max_len: int = key(1536, "longest trajectory, tokens", at_least=64, at_most=10**7)
    template: str = key(
        "chatml",
        "chat template: chatml (SmolLM2 and policies from scratch) | qwen3 (Qwen3, Qwen3-VL: tools "
        "and replies as these know them); neither rewrites an earlier turn",
        one_of=("chatml", "qwen3"),
    )
    dtype: str = key("float32", "of the weights", one_of=("float32", "bfloat16"))
    quantize: str = key(
        "none",
        "the frozen base under an adapter: none | nf4 (4 bits by bitsandbytes, QLoRA)",
        one_of=("none", "nf4"),
    )
    autocast: bool = key(
        True, "run matrix products in bfloat16 while training (weights keep `dtype`)"
    )
    attn: str = key(
        "auto",
        "attention: auto | sdpa | flash_attention_2; auto: torch's kernels, each packed example by "
        "itself; sdpa: a mask over the row; flash_attention_2: the package flash-attn, on CUDA",
        one_of=("auto", "sdpa", "flash_attention_2"),
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in the backward pass: less memory, for long trajectories"
    )
    lora_rank: int = key(32, "LoRA rank; the paper gives none", at_least=1, at_most=4096)
    lora_alpha: int = key(
        64, "LoRA scale is lora_alpha / lora_rank; the paper gives none", at_least=1, at_most=10**5
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class DataConfig:
    """VisGenData (Sec. 3) and the general mix (Table 7) at this experiment's scale.

    All defaults are ours; configs/visgen.yaml has the paper's 20k queries, configs/qwen3vl-8b.yaml
    its 1M general examples.
    """

    queries: int = key(
        1600, "task requests given to VisionAgent (paper: 20k)", at_least=1, at_most=MANY
    )
    min_reward: float = key(
        0.9,
        "LtrReward below which a trajectory is dropped (paper: filter, threshold not given); 0: "
        "none is",
        at_least=0,
        at_most=1,
    )
    general: int = key(
        12000,
        "examples that stand for the paper's General-1M; a stage takes a share of them; 0: none",
        at_least=0,
        at_most=MANY,
    )
    general_source: str = key(
        "offline",
        "offline: generated here; hub: read from Table 7's data sets by name",
        one_of=("offline", "hub"),
    )
    general_kinds: dict = key(
        {"arithmetic": 1, "copy": 2, "instruction": 2, "function": 2, "reading": 0},
        "parts of the offline general mix, by weight; 0: left out",
        at_least=0,
        at_most=1000,
    )
    general_heldout: int = key(
        192, "held-out general items, as many of each kind, exact match", at_least=1, at_most=MANY
    )
    train_tasks: int = key(
        2000,
        "tasks that VRL takes from, in wordings that stand in no expert trajectory and in no "
        "held-out task",
        at_least=1,
        at_most=MANY,
    )
    heldout_tasks: int = key(
        128,
        "held-out tasks: subjects, wordings and combinations that training never shows",
        at_least=1,
        at_most=MANY,
    )
    max_shots: int = key(3, "most shots of a video task", at_least=1, at_most=1000)
    max_images: int = key(6, "most images of an image task", at_least=1, at_most=1000)
    max_steps: int = key(
        24,
        "most steps of a task's expert plan (the paper's trajectories have 15 on average)",
        at_least=1,
        at_most=1000,
    )
    long: int = key(
        1,
        "up to so many times the shots or pictures that a task type's requests have otherwise; "
        "above 1, as at the paper's scale (Fig. 5), most films have many shots and most sets one "
        "identity (the shares are ours)",
        at_least=1,
        at_most=1000,
    )
    families: float = key(
        0.2,
        "share of requests from the families that need the less common tools (data/families.yaml); "
        "0: the 15 workflows alone",
        at_least=0,
        at_most=1,
    )
    languages: list = key(
        ["en"],
        "languages of the requests: en (42 task types) and zh (27 of them); with both, all 69 in "
        "turn",
    )
    scenarios: list = key(
        ["all"],
        "task types of the requests, by their names in data/scenarios.yaml: a smaller world, which "
        "a smaller policy learns; all: every one of the languages'",
    )
    sounds: list = key(
        ["music", "narration", "sfx", "subtitles"],
        "what films may be asked to have beside pictures: music | narration | sfx (effects) | "
        "subtitles; fewer are a smaller world",
        one_of=("music", "narration", "sfx", "subtitles"),
    )
    invented: bool = key(
        False,
        "whether subjects, styles and asides of expert trajectories and exercises are mostly put "
        "together from words, made-up ones among them, so that a policy from scratch learns to "
        "copy; false: all are written ones, as those of VRL's tasks always are",
    )
    thoughts: str = key(
        "full",
        "how much the scripted VisionAgent says: full: what it understood, weighed, saw and "
        "checked, prompts as sentences, looks at what it made; short: a sentence a turn, prompts "
        "of a few words, for a tiny policy",
        one_of=("short", "full"),
    )
    lapses: float = key(
        0.0,
        "chance of each part of the scripted VisionAgent's metacognition to be absent from a "
        "trajectory, so that the filter has something to drop; 0: it is always there",
        at_least=0,
        at_most=1,
    )
    agent: str = key(
        "scripted",
        "VisionAgent: scripted (offline, deterministic, ours) | openai (an LLM, see section llm)",
        one_of=("scripted", "openai"),
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class Stage:
    """One SFT stage of PST (Sec. 4.2): D = D_gen(share) U repeat x D_vis."""

    general: float = key(
        0.5,
        "share of `data.general`: the paper's 500K of 1M is 0.5, 200K is 0.2; 0: VisGenData alone",
        at_least=0,
        at_most=1,
    )
    repeat: int = key(
        3,
        "lambda, repetitions of VisGenData (paper, Table 4: 3); 0: the general mix alone",
        at_least=0,
        at_most=1000,
    )
    lr: float = key(
        3e-3,
        "peak learning rate of AdamW in this stage (`pst.warmup` has the curve); ours",
        at_least=LEAST_RATE,
        at_most=1,
    )
    matrix_lr: float = key(
        0.02,
        "peak learning rate of Muon (`pst.optimizer: muon`); torch's form, scaled up for tall "
        "matrices; ours",
        at_least=LEAST_RATE,
        at_most=1,
    )
    tokens: int = key(
        0,
        "tokens to train on; 0: each example once (paper); more: the stage's mix is cycled, less: "
        "cut",
        at_least=0,
        at_most=10**13,
    )
    unit: str = key(
        "examples",
        "what `general` is a share of: the general mix's examples (paper), or its tokens",
        one_of=("examples", "tokens"),
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class PstConfig:
    """Progressive Specialization Training (Sec. 4.2).

    The paper gives the stages and lambda; the optimizer's values are ours.
    """

    stages: list[Stage] = key(
        [Stage(0.5, 3), Stage(0.2, 3)],
        "stages in order (paper: these two); one entry is one-stage SFT",
    )
    tune: str = key(
        "full",
        "full: all weights; lora: an adapter, merged in fp32 at the end",
        one_of=("full", "lora"),
    )
    optimizer: str = key(
        "adamw",
        "adamw | adamw8bit (bitsandbytes: moments in 8 bits) | muon: torch.optim.Muon on the "
        "matrices inside the blocks, AdamW on the rest (see configs/tiny.yaml)",
        one_of=("adamw", "adamw8bit", "muon"),
    )
    row_len: int = key(
        768, "tokens of a packed row; at least the longest example", at_least=64, at_most=10**7
    )
    rows_per_step: int = key(
        4, "packed rows of one optimizer step, all ranks together", at_least=1, at_most=10**5
    )
    micro_rows: int = key(4, "packed rows of one forward pass", at_least=1, at_most=10**5)
    warmup: float = key(
        0.03,
        "share of all steps of PST with rising learning rate, at the start of its first stage; one "
        "curve goes over all stages, and a stage's `lr` is its peak on it; 0: no rise",
        at_least=0,
        at_most=1,
    )
    cooldown: float = key(
        0.3,
        "share of all steps of PST with falling learning rate, at the end of its last stage; "
        "between the two it stays at the stage's peak; 0: no fall",
        at_least=0,
        at_most=1,
    )
    weight_decay: float = key(
        0.01, "of AdamW and Muon, on matrices only; 0: none", at_least=0, at_most=1
    )
    save_every: int = key(200, "steps between checkpoints", at_least=1, at_most=MANY)
    init_from: str = key(
        "", "a finished PST folder to take instead of training (ablations share one PST)"
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class VrlConfig:
    """GRPO-based Virtual Reinforcement Learning (Sec. 4.3).

    The paper gives 24 x 4. Every other default is ours, or that of the cited paper.
    """

    start: str = key(
        "pst",
        "pst: from the PST policy (RL1, RL2, RL4); base: from the model without PST (RL3)",
        one_of=("pst", "base"),
    )
    steps: int = key(60, "optimizer phases, each on fresh rollouts", at_least=1, at_most=MANY)
    tasks_per_step: int = key(24, "paper: 24 tasks", at_least=1, at_most=10**5)
    group_size: int = key(4, "paper: 4 rollouts a task", at_least=2, at_most=10**4)
    lr: float = key(
        1e-3,
        "peak learning rate of AdamW on the LoRA adapter, or on all weights",
        at_least=LEAST_RATE,
        at_most=1,
    )
    norm_lr: float = key(
        0.0,
        "peak learning rate of the final norm; 0: that of the rest with tune: full, and with the "
        "adapter it is not trained (vLLM takes no adapter with a norm)",
        at_least=0,
        at_most=1,
    )
    optimizer: str = key(
        "adamw",
        "adamw | adamw8bit (bitsandbytes: moments in 8 bits)",
        one_of=("adamw", "adamw8bit"),
    )
    warmup: int = key(
        5, "steps of rising learning rate, at the start; 0: none", at_least=0, at_most=MANY
    )
    cooldown: int = key(
        0,
        "steps of falling learning rate, at the end; between the two it stays at its peak; 0: none",
        at_least=0,
        at_most=MANY,
    )
    weight_decay: float = key(0.0, "of AdamW; 0: none", at_least=0, at_most=1)
    max_grad_norm: float = key(
        1.0, "the gradient is clipped to this norm", at_least=1e-6, at_most=1e9
    )
    tune: str = key("lora", "lora: train the adapter; full: all weights", one_of=("lora", "full"))
    minibatches: int = key(
        1, "optimizer steps on one batch of rollouts; 1 is on-policy", at_least=1, at_most=1000
    )
    micro_tokens: int = key(
        8192, "tokens of one forward pass of the update, padding included", at_least=1, at_most=MANY
    )
    advantage: str = key(
        "mean_std",
        "mean_std: GRPO 2402.03300; mean: Dr. GRPO 2503.20783",
        one_of=("mean_std", "mean"),
    )
    loss_mean: str = key(
        "token",
        "token: mean over all tokens of the step, DAPO 2503.14476; sequence: 2402.03300",
        one_of=("token", "sequence"),
    )
    ratio: str = key(
        "token", "token: 2402.03300; sequence: GSPO 2507.18071", one_of=("token", "sequence")
    )
    clip_low: float = key(
        0.2, "the ratio is clipped below at 1 - clip_low", at_least=1e-6, at_most=1
    )
    clip_high: float = key(
        0.2,
        "the ratio is clipped above at 1 + clip_high; 0.28 is DAPO's clip-higher",
        at_least=1e-6,
        at_most=100,
    )
    kl_coef: float = key(
        0.0,
        "KL to pi_pst over all of a step's rollouts: Theorem 4.1's action bias; 0 is off",
        at_least=0,
        at_most=100,
    )
    tis_cap: float = key(
        2.0,
        "cap of the truncated importance weight of sampler against trainer, whichever the engine: "
        "with model.autocast our own sampler, in float32, is off the trainer too; 0 is off",
        at_least=0,
        at_most=1000,
    )
    mask_truncated: bool = key(
        False, "leave rollouts that hit a limit out of the loss (DAPO's overlong filter)"
    )
    save_every: int = key(10, "steps between checkpoints", at_least=1, at_most=MANY)

    __post_init__ = check_values


@dataclass(frozen=True)
class RolloutConfig:
    """What the environment (Sec. 4.3.1) and the sampler are told. All defaults are ours."""

    tools: str = key(
        "names",
        "how the system message lists the tools: schema, signature or names",
        one_of=("schema", "signature", "names"),
    )
    tool_pool: str = key(
        "task",
        "which tools the agent has: the task's pool (task) or all 36 (all)",
        one_of=("task", "all"),
    )
    engine: str = key(
        "transformers",
        "who samples: transformers (our batched sampler on it, any device) | vllm (one engine a "
        "rank, in the trainer's process)",
        one_of=("transformers", "vllm"),
    )
    gpu_memory: float = key(
        0.4, "vllm: share of a GPU's memory for its weights and KV cache", at_least=0.01, at_most=1
    )
    max_turns: int = key(
        32, "turns after which an episode without an answer is cut off", at_least=1, at_most=MANY
    )
    failure_scale: float = key(
        1.0,
        "multiplies the rates of accidents in tools.yaml; 0 switches them off",
        at_least=0,
        at_most=1000,
    )
    temperature: float = key(
        1.0,
        "of training rollouts, which come from the full softmax: no top-p, top-k or min-p; above 0",
        at_least=0,
        at_most=100,
    )
    max_turn_tokens: int = key(
        448,
        "tokens after which an unfinished turn ends the episode as max_tokens",
        at_least=1,
        at_most=10**7,
    )
    fidelity: float = key(
        1.0,
        "C_tool of the simulator: 1 - fidelity of the calls deviate from the real service; 0: all",
        at_least=0,
        at_most=1,
    )
    deviations: dict = key(
        dict.fromkeys(DEVIATIONS, 1),
        "parts of the MDP that a deviating call deviates in, by weight (lib/dials.py); 0: never",
        at_least=0,
        at_most=1000,
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class RewardConfig:
    """LtrReward (Sec. 4.3.2). The paper gives the parts and the product; every number is ours."""

    form: str = key(
        "plan*fine",
        "plan*fine: RL4, the paper's | plan*(result+format): RL2, RL3 | result+format: RL1 | "
        "plan+fine: a mean over all, the sum of VisionCreator-R1",
        one_of=FORMS,
    )
    judge: str = key(
        "rules",
        "of R_plan and R_traj: rules (offline, deterministic, ours) | openai (the paper's LLM "
        "evaluators, see section llm)",
        one_of=("rules", "openai"),
    )
    weights: dict = key(
        {"tool": 0.5, "format": 1.0, "result": 1.5, "traj": 1.0, "cons": 1.0},
        "of R_fine's parts; equal in VisionCreator-R1, but a wish that is missed must cost more "
        "than carrying it out risks, see docs/reward.md; 0: left out",
        at_least=0,
        at_most=1000,
    )
    facet_weights: dict = key(
        {
            "requirement": 2.0,
            "coherence": 1.0,
            "executability": 1.0,
            "atomicity": 1.0,
            "optimality": 1.0,
        },
        "of R_plan's facets; the binary one counts double, since the rest is idle without it; 0: "
        "left out",
        at_least=0,
        at_most=1000,
    )
    duration_tolerance: float = key(
        0.1,
        "seconds; two frames at 24 per second are 0.083. See about_tolerance; 0: none",
        at_least=0,
        at_most=1000,
    )
    about_tolerance: float = key(
        0.1,
        "relative, of a duration that the request calls about, roughly or some; 0: none",
        at_least=0,
        at_most=1,
    )
    beat_tolerance: float = key(
        0.05,
        "seconds between a cut and a beat; a frame at 24 per second is 0.042; 0: none",
        at_least=0,
        at_most=1000,
    )
    size_tolerance: float = key(
        0.05,
        "relative, on the short side of 720p and 1080p; Kling's 1904x1088 passes; 0: none",
        at_least=0,
        at_most=1,
    )
    aspect_tolerance: float = key(
        0.05,
        "relative; 1344x768 passes as 16:9 (1.6 % off), 1344x704 does not (7.4 %); 0: none",
        at_least=0,
        at_most=1,
    )
    dear: float = key(
        2.0,
        "times the expert's price; what an episode spends beyond that lowers R_tool and R_traj",
        at_least=1,
        at_most=1000,
    )
    long_plan: float = key(
        2.0,
        "times the steps of the shortest expert plan; a longer plan is scaled down by its length",
        at_least=1,
        at_most=1000,
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class LlmConfig:
    """A model at an OpenAI-compatible endpoint. All defaults are ours; the paper names no limits.

    The LLM judge (`reward.judge: openai`), VisionAgent (`data.agent: openai`) and the VLM-Grader
    (`bench.grader: vlm`) share it. A run may go on under another `llm` section: data by one model,
    judged by another.
    """

    url: str = key(
        "http://127.0.0.1:8000/v1",
        "any OpenAI-compatible endpoint; this is where vLLM serves by default",
    )
    model: str = key("model", "the model's name there")
    key_env: str = key(
        "LLM_API_KEY", "environment variable with the API key; a local server needs none"
    )
    timeout_s: float = key(
        120.0, "for a whole request, from its start to the last byte", at_least=0.001, at_most=10**6
    )
    tries: int = key(
        5,
        "requests for one verdict or turn: the next one after a timeout, 408, 409, 429, 5xx or an "
        "unreadable reply",
        at_least=1,
        at_most=1000,
    )
    backoff_s: float = key(
        1.0,
        "wait before the second try, doubled before each later one; a longer Retry-After of the "
        "server's is kept to; 0: no wait",
        at_least=0,
        at_most=3600,
    )
    concurrency: int = key(
        32, "verdicts or tasks at once, a request each", at_least=1, at_most=10**4
    )
    temperature: float = key(
        0.7,
        "of VisionAgent's turns; the judge and the grader are greedy; 0: greedy too",
        at_least=0,
        at_most=2,
    )
    max_tokens: int = key(
        4096,
        "of one verdict or turn, the thoughts of a reasoning model included",
        at_least=1,
        at_most=10**7,
    )
    max_run_tokens: int = key(
        100_000_000,
        "cap on cost: tokens, in and out, of one process; above it no request is sent and the run "
        "stops. Seen: 12,231 to judge four trajectories",
        at_least=1,
        at_most=10**13,
    )
    max_failures: float = key(
        0.05,
        "share of verdicts or tasks that may fail; above it the run stops, once 20 were asked for; "
        "0: none may",
        at_least=0,
        at_most=1,
    )
    price_in: float = key(
        0.0,
        "US$ per million tokens read; with price_out also 0, the cost counts as not known",
        at_least=0,
        at_most=10**6,
    )
    price_out: float = key(
        0.0, "US$ per million tokens written; 0: see price_in", at_least=0, at_most=10**6
    )
    cache: str = key(
        "runs/.llm",
        "folder of replies, a file a request: what was asked before costs nothing (no run can have "
        "this name)",
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class BenchConfig:
    """Evaluation on held-out tasks, and VisGenBench (Sec. 5.1). All defaults are ours."""

    tasks: int = key(
        128, "held-out tasks measured (at most data.heldout_tasks)", at_least=1, at_most=MANY
    )
    sampled: bool = key(True, "also measure at temperature 1 beside greedy decoding")
    grader: str = key(
        "structural",
        "of the six subjective columns: structural (from records, no model, ours) | vlm (the "
        "paper's, see section llm)",
        one_of=("structural", "vlm"),
    )
    calibration: str = key(
        "",
        "calibration.json of `bench.py calibrate`, put over the vlm grader's scores; empty: they "
        "stand as graded",
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class Config:
    """One experiment: the keys of the run, and the sections."""

    name: str = key("", "run folder under runs/; empty: the config file's name")
    seed: int = key(
        0, "everything random derives from it; 0 is as good as any", at_least=0, at_most=2**32 - 1
    )
    threads: int = key(0, "torch CPU threads; 0: leave torch's choice", at_least=0, at_most=1024)
    device: str = key(
        "auto",
        "auto | cpu | cuda; auto is cuda where torch sees a GPU",
        one_of=("auto", "cpu", "cuda"),
    )
    track: list = key(
        [],
        "where the metrics go beside metrics.jsonl: any of tensorboard | wandb | trackio, each a "
        "package of that name",
        one_of=TRACKERS,
    )
    model: ModelConfig = key(ModelConfig(), "the policy; defaults are ours")
    data: DataConfig = key(
        DataConfig(), "VisGenData (Sec. 3) and the general mix (Table 7); defaults are ours"
    )
    pst: PstConfig = key(
        PstConfig(), "two-stage SFT (Sec. 4.2); defaults are ours but for what says paper"
    )
    vrl: VrlConfig = key(
        VrlConfig(),
        "GRPO (Sec. 4.3); defaults are ours but for what says paper or names another one",
    )
    rollout: RolloutConfig = key(
        RolloutConfig(), "VisGenEnv (Sec. 4.3.1) and sampling; defaults are ours"
    )
    reward: RewardConfig = key(
        RewardConfig(), "LtrReward (Sec. 4.3.2); defaults are ours but for the form"
    )
    llm: LlmConfig = key(
        LlmConfig(), "the LLM of judge, VisionAgent and VLM-Grader; defaults are ours"
    )
    bench: BenchConfig = key(
        BenchConfig(), "held-out tasks and VisGenBench (Sec. 5.1); defaults are ours"
    )

    __post_init__ = check_config


def check_experiment(config: Config) -> None:
    """SystemExit for keys that each may have their value, but not together."""
    vrl, rollout = config.vrl, config.rollout
    check_sizes(config.model)
    for number, stage in enumerate(config.pst.stages):
        if not stage.general and not stage.repeat:
            raise SystemExit(
                f"error: pst.stages[{number}] has general 0 and repeat 0, so nothing to train on; "
                "raise one of them"
            )
    of_every_episode = ("tool", "format", "result", "traj")
    if not any(config.reward.weights[part] for part in of_every_episode):
        raise SystemExit(
            "error: reward.weights has nothing above 0 but cons, which only some requests have; "
            f"raise one of {', '.join(of_every_episode)}"
        )
    check_bfloat16(config)
    if vrl.tune == "full" and vrl.kl_coef:
        raise SystemExit(
            "error: vrl.kl_coef needs the adapter (pi_pst is the policy with the adapter off); "
            "set vrl.tune=lora or vrl.kl_coef=0"
        )
    if rollout.engine == "vllm" and (vrl.tune == "full" or vrl.norm_lr):
        raise SystemExit(
            "error: vLLM is given the LoRA adapter alone: with rollout.engine=vllm set "
            "vrl.tune=lora and vrl.norm_lr=0"
        )
    if rollout.temperature <= 0:
        raise SystemExit(
            f"error: rollout.temperature is {rollout.temperature}; training samples, so it must be "
            "above 0"
        )


def check_sizes(model: ModelConfig) -> None:
    """SystemExit for sizes of a policy from scratch that make no model."""
    if model.path:
        return
    if model.heads % model.kv_heads:
        raise SystemExit(
            f"error: model.heads is {model.heads} and model.kv_heads {model.kv_heads}; as many "
            "query heads must share each key head"
        )
    if model.head_dim % 2:
        raise SystemExit(
            f"error: model.head_dim is {model.head_dim}; rotary positions take its numbers in "
            "pairs, so it must be even"
        )


def check_bfloat16(config: Config) -> None:
    """SystemExit where all weights would be trained in bfloat16.

    It has 8 bits of a number: a step of a usual rate is rounded away, and nothing moves. (What
    stands beside a frozen base, adapter and final norm, is float32 in any case.)
    """
    trains_all = {
        "pst": config.pst.tune == "full" and not config.pst.init_from,
        "vrl": config.vrl.tune == "full",
    }
    for phase, in_full in trains_all.items():
        if in_full and config.model.dtype == "bfloat16":
            raise SystemExit(
                f"error: {phase}.tune=full with model.dtype=bfloat16 rounds most steps away; set "
                f"model.dtype=float32 (model.autocast computes in bfloat16) or {phase}.tune=lora"
            )


# --------------------------------------------------------------------------------------------------
# From files and the command line to a Config
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The Config of a YAML file, `section.key=value` strings on top.

    SystemExit with one clear line on any fault.
    """
    config = read_config(Config(), path, overrides)
    if not config.name:
        config = replace(config, name=Path(path).stem)
    check_experiment(config)
    return config


def read_config(config, path: str | Path | None, overrides: Sequence[str] = ()):
    """`config` with the values of a YAML file (None: none) and of `section.key=value` strings.

    The strings come above the file, and the files of its `extends:` chain beneath it. `config` is
    a Config, or a dict of some of its sections. SystemExit names what is wrong.
    """
    path = path and find_config(Path(path))
    values, given = read_values(path, overrides)
    if not isinstance(values, dict):
        raise SystemExit(
            f"error: {path} must hold `section:` entries, got a {type(values).__name__}"
        )
    parent = values.pop("extends", None)
    if parent:
        config = read_config(config, path.parent / parent)
    return build(build(config, values), given)


def find_config(path: Path) -> Path:
    """A config file by its path from here or, if it is not there, from the repository's root.

    SystemExit names the places that were tried.
    """
    tried = list(dict.fromkeys([Path.cwd() / path, ROOT / path]))
    for place in tried:
        if place.is_file():
            return place
    configs = (ROOT / "configs").rglob("*.yaml")
    known = ", ".join(sorted(p.relative_to(ROOT).as_posix() for p in configs))
    raise SystemExit(
        f"error: no config file {path}: tried {' and '.join(map(str, tried))}; configs in {ROOT}: "
        f"{known}"
    )


def read_values(path: Path | None, overrides: Sequence[str]) -> tuple[Any, dict]:
    """What stands in a YAML file (None: an empty dict), and in the overrides, as plain values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for item in overrides:
        if "=" not in item:
            raise SystemExit(
                f"error: {item!r} is no override; write section.key=value, such as vrl.steps=3"
            )
    try:
        file = OmegaConf.load(path) if path else OmegaConf.create()
        dotlist = OmegaConf.from_dotlist(list(overrides))
        return (
            OmegaConf.to_container(file, resolve=True),
            OmegaConf.to_container(dotlist, resolve=True),
        )
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        sources = " or ".join(str(source) for source in (path, *overrides) if source)
        reason = " ".join(str(e).split())
        raise SystemExit(f"error: {sources} is not valid YAML: {reason}") from e


def build(default, values, name: str = ""):
    """`default` with YAML values in place of its own, at any depth; a list is replaced whole.

    `default` is a section (a dataclass or a dict), a list of sections or a plain value; `name` is
    what messages call it, such as `pst.stages[0]`. Each value must have its default's type, but an
    int may stand for a float. SystemExit names the key of a wrong type or value, and for an unknown
    key the nearest known one.
    """
    of_sections = isinstance(default, list) and default and is_dataclass(default[0])
    if (is_dataclass(default) or isinstance(default, dict)) and isinstance(values, dict):
        return build_section(default, values, name)
    if of_sections and isinstance(values, list):
        section = type(default[0])()
        return [build(section, value, f"{name}[{i}]") for i, value in enumerate(values)]
    int_for_float = type(default) is float and type(values) is int
    if type(values) is not type(default) and not int_for_float:
        kind = "section of keys" if is_dataclass(default) else type(default).__name__
        raise SystemExit(
            f"error: config key `{name}` must be of type {kind}, "
            f"got {values!r} ({type(values).__name__})"
        )
    return type(default)(values)


def build_section(default, values: dict, name: str):
    """A section with YAML values in place of its own; the work of `build` on one level."""
    known = default
    if is_dataclass(default):
        known = {f.name: getattr(default, f.name) for f in fields(default)}
    prefix = f"{name}." if name else ""
    for given in values:
        if given not in known:
            near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.0)[0]
            raise SystemExit(
                f"error: unknown config key `{prefix}{given}`; "
                f"the nearest known key is `{prefix}{near}`"
            )
    built = {given: build(known[given], value, prefix + given) for given, value in values.items()}
    try:
        return type(default)(**{**known, **built})
    except ValueError as e:
        raise SystemExit(f"error: config key {prefix}{e}") from e


# --------------------------------------------------------------------------------------------------
# The command line
def command_line(
    doc: str,
    switches: Iterable[tuple[str, str]] = (),
    options: Iterable[tuple[str, str | None, str]] = (),
    default: str = "tiny.yaml",
    of_run: bool = False,
) -> tuple[Config, dict[str, Any]]:
    """Parse `--config FILE [switches] [options] [section.key=value ...]`.

    switches: (name, meaning); options: (name, the config key that it sets or None, meaning);
    default: the config file of the command alone; of_run: for a command on a run that is there,
    where the run's own config.yaml stands for the file, which then only names the run. Returns the
    Config and {switch or option that was given: its value}. `--keys` prints all keys and ends the
    program.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=str(ROOT / "configs" / default),
        help="experiment file (default: %(default)s)",
    )
    parser.add_argument(
        "--keys", action="store_true", help="print every config key with its default and meaning"
    )
    for name, meaning in switches:
        parser.add_argument(name, action="store_true", help=meaning)
    for name, _, meaning in options:
        parser.add_argument(name, help=meaning)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="config values on top of the file's",
    )
    # Overrides may stand before and after options.
    args = parser.parse_intermixed_args()
    if args.keys:
        print_keys(Config)
        raise SystemExit(0)

    given = {}
    for name in [name for name, *_ in switches] + [name for name, *_ in options]:
        value = getattr(args, name.lstrip("-").replace("-", "_"))
        if value:
            given[name] = value
    overrides = list(args.overrides)
    for name, config_key, _ in options:
        if config_key and name in given:
            overrides.append(f"{config_key}={given[name]}")
    config = load_config(args.config, overrides)
    own = ROOT / "runs" / config.name / "config.yaml"
    if of_run and own.is_file():
        config = load_config(own, overrides)
    return config, given


def print_keys(section: type, values=None, prefix: str = "") -> None:
    """Print every config key with its default and meaning, a line a key.

    section: a dataclass of keys; values: an instance in place of its defaults.
    """
    values = values or section()
    for f in fields(section):
        name, value, meaning = prefix + f.name, getattr(values, f.name), f.metadata["doc"]
        if is_dataclass(value):
            print(f"\n{name}:  # {meaning}")
            print_keys(type(value), value, f"{name}.")
            continue
        of_sections = isinstance(value, list) and value and is_dataclass(value[0])
        shown = [asdict(v) for v in value] if of_sections else value
        print(f"{name} = {json.dumps(shown, ensure_ascii=False)}   # {meaning}")
        if of_sections:
            print_keys(type(value[0]), prefix=f"{name}[].")
