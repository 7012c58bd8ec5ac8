"""An experiment: every config key with its default and meaning, how a YAML file of this folder becomes a Config, and the run's files and seeds.

One YAML describes one experiment: sections of keys, `extends:` for what another file says already, and `section.key=value` on the command line
above both. A key that is not here is an error that names the nearest one. `python make_data.py --keys` prints them all.
"""

import argparse
import copy
import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import yaml

from lib.runs import ROOT

FORMS = ("plan*fine", "plan*(result+format)", "result+format", "plan+fine")


def key(default, doc, allowed=None):
    """A config key: its default (lists and dicts are copied for each instance), its meaning, and what it may be: one of a tuple's values,
    between a list's two numbers, or at least a number."""
    return field(
        default_factory=lambda: copy.copy(default), metadata={"doc": doc, "allowed": allowed}
    )


def check_values(section):
    """ValueError for a value that its key does not allow."""
    for f in fields(section):
        value, allowed = getattr(section, f.name), f.metadata["allowed"]
        if isinstance(allowed, tuple) and value not in allowed:
            raise ValueError(f"{f.name} is {value!r}; allowed: {', '.join(allowed)}")
        least, most = allowed if isinstance(allowed, list) else (allowed, math.inf)
        if isinstance(least, (int, float)) and not least <= value <= most:
            raise ValueError(
                f"{f.name} is {value!r}; it must be at least {least}"
                + (f" and at most {most}" if most < math.inf else "")
            )


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a Qwen3 from scratch (the tiny configs) or a pretrained model (`path`)."""

    path: str = key(
        "",
        "folder or hub name of a pretrained model; empty: a Qwen3 from scratch with the sizes below",
    )
    vocab_size: int = key(
        1536, "byte-level BPE tokens, tags and control tokens included (from scratch only)"
    )
    hidden_size: int = key(160, "width (from scratch only)")
    intermediate_size: int = key(480, "width inside the MLP (from scratch only)")
    layers: int = key(4, "transformer blocks (from scratch only)")
    heads: int = key(5, "query heads (from scratch only)")
    kv_heads: int = key(5, "key/value heads (from scratch only)")
    head_dim: int = key(32, "size of one head (from scratch only)")
    base_examples: int = key(
        0,
        "copying exercises that a policy from scratch is trained on first: they stand for the pretrained model of the paper",
    )
    max_len: int = key(1536, "longest trajectory, tokens")
    template: str = key(
        "chatml",
        "chat template: chatml (SmolLM2 and policies from scratch) | qwen3 (Qwen3, Qwen3-VL: tools and replies as these know them); "
        "neither rewrites an earlier turn",
        ("chatml", "qwen3"),
    )
    dtype: str = key("float32", "weights: float32 or bfloat16", ("float32", "bfloat16"))
    quantize: str = key(
        "none",
        "the frozen base under an adapter: none | nf4 (bitsandbytes, QLoRA)",
        ("none", "nf4"),
    )
    autocast: bool = key(
        True, "run matrix products in bfloat16 while training (weights keep `dtype`)"
    )
    attn: str = key(
        "auto",
        "attention: auto | sdpa | flash_attention_2; auto is flash on CUDA where installed, else sdpa",
        ("auto", "sdpa", "flash_attention_2"),
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in the backward pass (long trajectories)"
    )
    lora_rank: int = key(32, "LoRA rank; the paper gives none")
    lora_alpha: int = key(64, "LoRA scale is lora_alpha / lora_rank")

    __post_init__ = check_values


@dataclass(frozen=True)
class LlmConfig:
    """A model at an OpenAI-compatible endpoint: the LLM judge (`reward.judge: openai`), VisionAgent
    (`data.agent: openai`) and the VLM-Grader (`bench.grader: vlm`) share it. The limits are ours.

    A run may go on under another `llm` section: data by one model, judged by another.
    """

    url: str = key(
        "http://127.0.0.1:8000/v1",
        "any OpenAI-compatible endpoint; this is where vLLM serves by default",
    )
    model: str = key("model", "the model's name there")
    key_env: str = key(
        "LLM_API_KEY", "environment variable with the API key; a local server needs none"
    )
    timeout_s: float = key(120.0, "for a whole request, from its start to the last byte")
    tries: int = key(
        5,
        "requests for one verdict or turn: the next one after a timeout, 408, 409, 429, 5xx "
        "or an unreadable reply",
        1,
    )
    backoff_s: float = key(
        1.0,
        "wait before the second try, doubled before each later one; a longer Retry-After of the "
        "server's is kept to",
    )
    concurrency: int = key(32, "verdicts or tasks at once, a request each", 1)
    temperature: float = key(
        0.7, "of VisionAgent's turns; the judge and the grader are greedy", [0, 2]
    )
    max_tokens: int = key(
        4096, "of one verdict or turn, the thoughts of a reasoning model included", 1
    )
    max_run_tokens: int = key(
        100_000_000,
        "cap on cost: tokens, in and out, of one process; above it no request is sent and the run "
        "stops. Seen: 12,231 to judge four trajectories",
    )
    max_failures: float = key(
        0.05,
        "share of verdicts or tasks that may fail; above it the run stops, once 20 were asked for",
        [0, 1],
    )
    price_in: float = key(
        0.0, "US$ per million tokens read; with price_out also 0, the cost counts as not known", 0
    )
    price_out: float = key(0.0, "US$ per million tokens written", 0)
    cache: str = key(
        "runs/.llm",
        "folder of replies, a file a request: what was asked before costs nothing (no run can have "
        "this name)",
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class DataConfig:
    """VisGenData (Sec. 3) and the general mix (Table 7) at this experiment's scale."""

    queries: int = key(1600, "task requests given to VisionAgent (paper: 20k)", 1)
    min_reward: float = key(
        0.9, "LtrReward below which a trajectory is dropped (paper: filter, threshold not given)"
    )
    general: int = key(
        12000, "examples that stand for the paper's General-1M; a stage takes a share of them"
    )
    general_source: str = key(
        "offline",
        "offline: generated here; hub: read from Table 7's data sets by name",
        ("offline", "hub"),
    )
    general_kinds: dict = key(
        {"arithmetic": 1, "copy": 2, "instruction": 2, "function": 2},
        "parts of the offline general mix, by weight",
    )
    general_heldout: int = key(192, "held-out general items, as many of each kind, exact match")
    train_tasks: int = key(
        2000,
        "tasks that VRL draws from, in wordings that no expert trajectory shows, nor the held-out tasks",
    )
    heldout_tasks: int = key(
        128, "held-out tasks: subjects, wordings and combinations that training never shows"
    )
    per_type: int = key(
        0,
        "most trajectories of one task type; those with a plan that few have stay first; 0: all stay",
        0,
    )
    max_shots: int = key(3, "most shots of a video task")
    max_images: int = key(6, "most images of an image task")
    max_steps: int = key(
        24, "most steps of a task's expert plan (the paper's trajectories have 15 on average)"
    )
    long: bool = key(
        False,
        "requests at the paper's scale (Fig. 5): most films have many shots and most sets one identity (the shares are ours)",
    )
    languages: list = key(
        ["en"],
        "languages of the requests: en (42 task types) and zh (15 of them); with both, all 57 in turn",
    )
    agent: str = key(
        "scripted",
        "VisionAgent: scripted (offline, deterministic, ours) | openai (an LLM, see section llm)",
        ("scripted", "openai"),
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class Stage:
    """One SFT stage of PST (Sec. 4.2): D = D_gen(share) U repeat x D_vis."""

    general: float = key(0.5, "share of `data.general`: the paper's 500K of 1M is 0.5, 200K is 0.2")
    repeat: int = key(3, "lambda, repetitions of VisGenData (Table 4: 3x)")
    lr: float = key(3e-3, "peak learning rate of AdamW")
    matrix_lr: float = key(
        0.02,
        "peak learning rate of Muon (`pst.optimizer: muon`); torch's form, scaled up for tall matrices",
    )
    tokens: int = key(
        0, "tokens to train on; 0: each example once; more: the stage's mix is cycled, less: cut"
    )
    unit: str = key(
        "examples",
        "what `general` is a share of: the general mix's examples, as the paper counts, or its tokens",
        ("examples", "tokens"),
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class PstConfig:
    """Progressive Specialization Training (Sec. 4.2). The paper gives the stages and lambda; the optimizer's values are ours."""

    stages: list[Stage] = key(
        [Stage(0.5, 3), Stage(0.2, 3)], "stages in order; one entry is one-stage SFT"
    )
    tune: str = key(
        "full", "full: all weights; lora: an adapter, merged in fp32 at the end", ("full", "lora")
    )
    optimizer: str = key(
        "adamw",
        "adamw | adamw8bit (bitsandbytes: moments in 8 bits) | muon: torch.optim.Muon on the matrices inside the blocks, "
        "AdamW on the rest (see configs/tiny.yaml)",
        ("adamw", "adamw8bit", "muon"),
    )
    row_len: int = key(768, "tokens of a packed row; at least the longest example")
    rows_per_step: int = key(4, "packed rows of one optimizer step, all ranks together")
    micro_rows: int = key(4, "packed rows of one forward pass")
    warmup: float = key(0.03, "share of the stage's steps with rising learning rate")
    cooldown: float = key(
        0.3,
        "share of the stage's steps with falling learning rate, at its end; between the two it stays at its peak",
    )
    weight_decay: float = key(0.01, "AdamW and Muon, on matrices only")
    max_grad_norm: float = key(1.0, "gradient clipping")
    save_every: int = key(200, "steps between checkpoints")
    init_from: str = key(
        "", "a finished PST folder to take instead of training (ablations share one PST)"
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class VrlConfig:
    """GRPO-based Virtual Reinforcement Learning (Sec. 4.3). The paper gives 24 x 4; every other value is ours or a cited paper's."""

    start: str = key(
        "pst",
        "pst: from the PST policy (RL1, RL2, RL4); base: from the model without PST (RL3)",
        ("pst", "base"),
    )
    steps: int = key(60, "optimizer phases, each on fresh rollouts")
    tasks_per_step: int = key(24, "paper: 24 tasks", 1)
    group_size: int = key(4, "paper: 4 rollouts a task", 1)
    lr: float = key(1e-3, "AdamW on the LoRA adapter")
    norm_lr: float = key(
        0.0,
        "AdamW on the final norm beside the adapter; 0: it is not trained (vLLM takes no adapter with a norm)",
    )
    optimizer: str = key(
        "adamw", "adamw | adamw8bit (bitsandbytes: moments in 8 bits)", ("adamw", "adamw8bit")
    )
    warmup: int = key(5, "steps of rising learning rate, at the start")
    cooldown: int = key(
        0, "steps of falling learning rate, at the end; between the two it stays at its peak"
    )
    weight_decay: float = key(0.0, "AdamW")
    max_grad_norm: float = key(1.0, "gradient clipping")
    tune: str = key("lora", "lora: train the adapter; full: all weights", ("lora", "full"))
    minibatches: int = key(1, "optimizer steps on one batch of rollouts; 1 is on-policy", 1)
    micro_tokens: int = key(8192, "tokens of one forward pass of the update, padding included", 1)
    advantage: str = key(
        "mean_std", "mean_std: GRPO 2402.03300; mean: Dr. GRPO 2503.20783", ("mean_std", "mean")
    )
    loss_mean: str = key(
        "token",
        "token: mean over all tokens of the step, DAPO 2503.14476; sequence: 2402.03300",
        ("token", "sequence"),
    )
    ratio: str = key("token", "token: 2402.03300; sequence: GSPO 2507.18071", ("token", "sequence"))
    clip_low: float = key(0.2, "the ratio is clipped below at 1 - clip_low")
    clip_high: float = key(
        0.2, "the ratio is clipped above at 1 + clip_high; 0.28 is DAPO's clip-higher"
    )
    kl_coef: float = key(
        0.0, "KL to pi_pst in the loss (k3 estimate): Theorem 4.1's action bias; 0 is off"
    )
    tis_cap: float = key(
        2.0,
        "cap of the truncated importance weight of sampler against trainer; for rollout.engine vllm alone, since our own sampler "
        "computes what the trainer does; 0 is off",
        0,
    )
    mask_truncated: bool = key(
        False, "leave rollouts that hit a limit out of the loss (DAPO's overlong filter)"
    )
    save_every: int = key(10, "steps between checkpoints", 1)

    __post_init__ = check_values


@dataclass(frozen=True)
class BenchConfig:
    """Evaluation on held-out tasks, and VisGenBench."""

    tasks: int = key(128, "held-out tasks measured (at most data.heldout_tasks)")
    sampled: bool = key(True, "also measure at temperature 1 beside greedy decoding")
    grader: str = key(
        "structural",
        "of the six subjective columns: structural (from records, no model, ours) | vlm (the paper's, see section llm)",
        ("structural", "vlm"),
    )
    calibration: str = key(
        "",
        "calibration.json of `bench.py calibrate`, put over the vlm grader's scores; empty: they stand as graded",
    )


@dataclass(frozen=True)
class RolloutConfig:
    """Section `rollout` of a config file: what the environment and the sampler are told."""

    tools: str = key(
        "names",
        "how the system message lists the tools: schema, signature or names",
        ("schema", "signature", "names"),
    )
    tool_pool: str = key(
        "task", "which tools the agent has: the task's pool (task) or all 36 (all)", ("task", "all")
    )
    engine: str = key(
        "transformers",
        "who samples: transformers (our batched sampler below it, any device) | vllm (one engine a rank, in the trainer's process)",
        ("transformers", "vllm"),
    )
    gpu_memory: float = key(
        0.4, "vllm: share of a GPU's memory for its weights and KV cache", [0.01, 1]
    )
    max_turns: int = key(12, "turns after which an episode without an answer is cut off", 1)
    failure_scale: float = key(
        1.0, "multiplies every failure rate of tools.yaml; 0 switches failures off", 0
    )
    temperature: float = key(
        1.0, "of training rollouts, which come from the full softmax: no top-p, top-k or min-p"
    )
    max_turn_tokens: int = key(
        448, "tokens after which an unfinished turn ends the episode as max_tokens"
    )
    fidelity: float = key(
        1.0,
        "C_tool of the simulator: 1 - fidelity of the calls deviate from the real service",
        [0, 1],
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class RewardConfig:
    """LtrReward. The paper gives the parts and the product; every number below is ours."""

    form: str = key(
        "plan*fine",
        "plan*fine: RL4, the paper's | plan*(result+format): RL2, RL3 | result+format: RL1 | "
        "plan+fine: a mean over all, the sum of VisionCreator-R1",
        FORMS,
    )
    judge: str = key(
        "rules",
        "of R_plan and R_traj: rules (offline, deterministic, ours) | openai (the paper's LLM evaluators, see section llm)",
        ("rules", "openai"),
    )
    weights: dict = key(
        {"tool": 1.0, "format": 1.0, "result": 1.0, "traj": 1.0, "cons": 1.0},
        "of R_fine's parts; equal, as in VisionCreator-R1",
    )
    facet_weights: dict = key(
        {
            "requirement": 2.0,
            "coherence": 1.0,
            "executability": 1.0,
            "atomicity": 1.0,
            "optimality": 1.0,
        },
        "of R_plan's facets; the binary one counts double, since the rest is idle without it",
    )
    duration_tolerance: float = key(
        0.05, "relative; a 4 s step between clip lengths never passes, a cut frame always does"
    )
    size_tolerance: float = key(
        0.05, "relative, on the short side of 720p and 1080p; Kling's 1904x1088 passes"
    )
    aspect_tolerance: float = key(
        0.05, "relative; 1344x768 passes as 16:9 (1.6 % off), 1344x704 does not (7.4 %)"
    )
    quiet: float = key(0.1, "volume below which a sound counts as muted: -20 dB")
    shown_s: float = key(0.5, "seconds that a caption or a shot must stand to be seen")
    long_prompt: int = key(200, "words; a prompt beyond it names everything and shows nothing")
    long_plan: float = key(
        2.0,
        "times the steps of the shortest expert plan; a longer plan is scaled down by its length",
    )

    __post_init__ = check_values


@dataclass(frozen=True)
class Config:
    """One experiment. Sections are the design's; every key is listed by `--keys`."""

    name: str = key("", "run folder under runs/; empty: the config file's name")
    seed: int = key(0, "everything random derives from it")
    threads: int = key(0, "torch CPU threads; 0: leave torch's choice")
    device: str = key("auto", "auto | cpu | cuda")
    model: ModelConfig = key(ModelConfig(), "the policy")
    data: DataConfig = key(DataConfig(), "VisGenData and the general mix")
    pst: PstConfig = key(PstConfig(), "two-stage SFT")
    vrl: VrlConfig = key(VrlConfig(), "GRPO")
    rollout: RolloutConfig = key(RolloutConfig(), "VisGenEnv and sampling")
    reward: RewardConfig = key(RewardConfig(), "LtrReward")
    llm: LlmConfig = key(LlmConfig(), "the LLM of judge, VisionAgent and VLM-Grader")
    bench: BenchConfig = key(BenchConfig(), "evaluation")


# ---------------------------------------------------------------------------------------------------------------------
# From files and the command line to a Config
def read_config(config, path, overrides=()):
    """`config` with a YAML file (None: none) on top, its `extends:` chain beneath, `section.key=value` strings above. SystemExit names what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = path and Path(path)
    if path and not path.is_file():
        known = ", ".join(
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml"))
        )
        raise SystemExit(f"error: no config file {path}; configs here: {known}")
    for item in overrides:
        if "=" not in item:
            raise SystemExit(
                f"error: {item!r} is no override; write section.key=value, such as vrl.steps=3"
            )
    try:
        sources = (
            OmegaConf.load(path) if path else OmegaConf.create(),
            OmegaConf.from_dotlist(list(overrides)),
        )
        values, over = (OmegaConf.to_container(c, resolve=True) for c in sources)
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise SystemExit(
            f"error: {' or '.join(map(str, filter(None, (path, *overrides))))} is not valid YAML: {' '.join(str(e).split())}"
        ) from e
    if not isinstance(values, dict):
        raise SystemExit(
            f"error: {path} must hold `section:` entries, got a {type(values).__name__}"
        )
    parent = values.pop("extends", None)
    return build(
        build(read_config(config, path.parent / parent) if parent else config, values), over
    )


def build(default, values, where=""):
    """`default` with YAML values in place of its own, at any depth; each must have its default's type, a list is replaced whole.

    SystemExit names the key of a wrong type, and for an unknown key the nearest known one.
    """
    known = (
        {f.name: getattr(default, f.name) for f in fields(default)}
        if is_dataclass(default)
        else default
    )
    if isinstance(known, dict) and isinstance(values, dict):
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise SystemExit(
                    f"error: unknown config key `{where}{name}`; the nearest known key is `{where}{near}`"
                )
        try:
            return type(default)(
                **{
                    **known,
                    **{
                        name: build(known[name], value, f"{where}{name}.")
                        for name, value in values.items()
                    },
                }
            )
        except ValueError as e:
            raise SystemExit(f"error: config key {where}{e}") from e
    if isinstance(known, list) and isinstance(values, list) and known and is_dataclass(known[0]):
        return [
            build(type(known[0])(), value, f"{where[:-1]}[{i}].") for i, value in enumerate(values)
        ]
    if type(values) is not type(known) and (type(known), type(values)) != (float, int):
        kind = "section of keys" if is_dataclass(default) else type(known).__name__
        raise SystemExit(
            f"error: config key `{where[:-1]}` must be of type {kind}, got {values!r} ({type(values).__name__})"
        )
    return type(known)(values)


def load_config(path, overrides=()):
    """The Config of a YAML file, `section.key=value` strings on top. Raises SystemExit with one clear line on any fault."""
    config = read_config(Config(), path, overrides)
    return config if config.name else replace(config, name=Path(path).stem)


def print_keys(cls, values=None, where=""):
    """Print every config key with its default and meaning."""
    values = values or cls()
    for f in fields(cls):
        value = getattr(values, f.name)
        if is_dataclass(value):
            print(f"\n{where}{f.name}:  # {f.metadata['doc']}")
            print_keys(type(value), value, f"{where}{f.name}.")
        else:
            shown = (
                [asdict(v) for v in value]
                if isinstance(value, list) and value and is_dataclass(value[0])
                else value
            )
            print(
                f"{where}{f.name} = {json.dumps(shown, ensure_ascii=False)}   # {f.metadata['doc']}"
            )


def command_line(doc, switches=(), options=(), default="tiny.yaml"):
    """Parse `--config FILE [switches] [options] [section.key=value ...]`: (Config, {switch or option given: its value}). `--keys` prints all keys.

    `switches`: (name, meaning); `options`: (name, the config key that it sets or None, meaning); `default`: the config of the command alone.
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
    for switch, text in switches:
        parser.add_argument(switch, action="store_true", help=text)
    for option, _, text in options:
        parser.add_argument(option, help=text)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="config values on top of the file's",
    )
    args = parser.parse_intermixed_args()  # keys may stand before and after options
    if args.keys:
        print_keys(Config)
        raise SystemExit(0)
    names = [switch for switch, _ in switches] + [option for option, _, _ in options]
    given = {
        name: value
        for name in names
        if (value := getattr(args, name.lstrip("-").replace("-", "_")))
    }
    overrides = args.overrides + [
        f"{key}={given[option]}" for option, key, _ in options if key and option in given
    ]
    return load_config(args.config, overrides), given
