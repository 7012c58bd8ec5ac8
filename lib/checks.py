"""What a run needs that this machine may lack: looked for before the run writes anything.

A run's folder belongs to its config from the first file on, so a command that is refused later
would block the name for the config that would have worked.
"""

from importlib import import_module
from importlib.util import find_spec

from lib import fsdp
from lib.attention import attention_name
from lib.experiment import Config
from lib.hub import check_sources
from lib.policy import set_up, use_autocast
from lib.quantize import need_bitsandbytes, wants_nf4
from lib.runs import find_run
from lib.tokens import finished_policy, pretrained
from lib.track import check_trackers
from lib.vllm_engine import engine_dtype

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def check_training(config: Config, phases: tuple[str, ...]) -> None:
    """SystemExit if this machine cannot train `phases` ("pst", "vrl") under the config.

    Looked for: the device, attention, bitsandbytes, vLLM, the model, another run's policy, the
    general data, matplotlib, and the trackers. Writes nothing into the run.
    """
    if "vrl" in phases:
        check_drawing()
    check_trackers(config.track)
    run = find_run(config)
    device = set_up(config)
    attention_name(config, device)
    if config.pst.init_from:
        finished_policy(config.pst.init_from)
    for phase in phases:
        check_phase(config, phase)
    if "vrl" in phases and config.rollout.engine == "vllm":
        engine_dtype(config, device, use_autocast(config, device))
    if config.model.path and (not config.pst.init_from or starts_from_base(config, phases)):
        check_model(pretrained(config))
    if not (run / "data" / "done.json").is_file():
        check_sources(config)


def check_drawing() -> None:
    """SystemExit if matplotlib, which VRL draws its curve with as it runs, cannot be imported."""
    try:
        import_module("matplotlib.figure")
        import_module("matplotlib.backends.backend_agg")
    except ImportError as e:
        raise SystemExit(
            f"error: VRL draws curve.png with matplotlib, which cannot be imported ({e}); "
            "pip install -r requirements.txt"
        ) from e


def check_phase(config: Config, phase: str) -> None:
    """SystemExit if what phase `pst` or `vrl` imports is missing, or cannot serve its start."""
    from_scratch = not config.model.path and not config.model.base_examples
    from_base = phase == "pst" or config.vrl.start == "base"
    if wants_nf4(config, phase) and from_scratch and from_base:
        raise SystemExit(
            "error: config key `model.quantize` is nf4, which is for a base that is saved "
            "somewhere; set model.path, or model.quantize=none"
        )
    if getattr(config, phase).optimizer == "adamw8bit":
        need_bitsandbytes(f"config key `{phase}.optimizer`: adamw8bit")
    if phase == "pst":
        fsdp.check_sharding(config)
    if phase == "pst" or config.rollout.engine != "vllm":
        return
    if not find_spec("vllm"):
        raise SystemExit(
            "error: rollout.engine is vllm, which is not installed; on a GPU: pip install -r "
            "requirements-gpu.txt; on a CPU: see docs/node.md; or set rollout.engine=transformers"
        )
    if from_scratch and from_base:
        raise SystemExit(
            "error: vLLM loads the policy from a folder, and random weights have none; "
            "set model.base_examples or model.path"
        )


def starts_from_base(config: Config, phases: tuple[str, ...]) -> bool:
    """Whether VRL is to start from the policy before PST (RL3 of Table 4)."""
    return "vrl" in phases and config.vrl.start == "base"


def check_model(path: str) -> None:
    """SystemExit if no model and tokenizer can be had from a folder or by a hub name.

    What the hub has is downloaded here, but for the shards of a large model.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import cached_file

    try:
        AutoConfig.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
        found = any(
            cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in WEIGHTS
        )
    # OSError: no such folder, no such name, no network. ValueError: a model that nobody knows.
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise SystemExit(
            f"error: config key `model.path` is {path}, from which no model can be loaded: "
            f"{reason:.200}; give a folder, or a name on the hub and a network"
        ) from e
    if not found:
        raise SystemExit(
            f"error: config key `model.path` is {path}, which holds no weights ({WEIGHTS[0]})"
        )
