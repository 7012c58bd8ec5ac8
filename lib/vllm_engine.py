"""vLLM as the sampler of train_vrl.py (`rollout.engine: vllm`): all that is asked of it.

Written against vLLM 0.32; run here with its CPU build only. vLLM is imported when an engine is
made, so that everything loads without it.
"""

import gc
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from env import VisGenEnv
from lib import ranks
from lib.experiment import Config
from lib.rollout import Rollout, extend, go_on
from lib.runs import seeded_rng

# Of KV cache, on a CPU.
KV_GIB = 1
# Sequences that are decoded at once.
MAX_SEQUENCES = 256
# The adapter ranks that vLLM makes room for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def play_in_vllm(
    engine: "VllmEngine",
    rollouts: list[Rollout],
    envs: list[VisGenEnv],
    tokenizer,
    config: Config,
    temperature: float,
    seed: int,
    bar: tqdm,
) -> list[Rollout]:
    """Continuous batching over turns: nobody waits for the others.

    The moment a turn ends, the environment replies and the next turn is queued. Seeds are of the
    rollout and the turn, so what one samples does not depend on the others (but for rounding, in
    bfloat16).
    """
    members = member_numbers(rollouts)
    turns = [0] * len(rollouts)  # that have been queued

    def queue(number: int) -> None:
        rollout = rollouts[number]
        turn = turns[number]
        turn_seed = seeded_rng(seed, rollout.task["id"], members[number], turn).getrandbits(31)
        room = config.model.max_len - len(rollout.ids)
        engine.submit(
            f"{number}-{turn}",
            rollout.ids,
            min(config.rollout.max_turn_tokens, room),
            temperature,
            turn_seed,
            tokenizer.eos_token_id,
        )
        turns[number] += 1

    for number in range(len(rollouts)):
        queue(number)
    while engine.busy():
        for name, tokens, logprobs in engine.step():
            number = int(name.split("-")[0])
            tokens, logprobs = until_padded_row(tokens, logprobs, len(tokenizer))
            extend(rollouts[number], tokens, trained=True, logprobs=logprobs)
            if go_on(rollouts[number], envs[number], tokenizer, config) is None:
                bar.update()
            else:
                queue(number)
    bar.close()
    return rollouts


def member_numbers(rollouts: list[Rollout]) -> list[int]:
    """The number of each rollout inside its group, from 0."""
    seen = Counter()
    numbers = []
    for rollout in rollouts:
        numbers.append(seen[rollout.group_id])
        seen[rollout.group_id] += 1
    return numbers


def until_padded_row(
    tokens: list[int], logprobs: list[float], vocabulary: int
) -> tuple[list[int], list[float]]:
    """A turn up to its first token of a padded row of the vocabulary, which ends the episode."""
    for i, token in enumerate(tokens, 1):
        if token >= vocabulary:
            return tokens[:i], logprobs[:i]
    return tokens, logprobs


def engine_settings(config: Config, device: torch.device, dtype: str) -> dict:
    """What vLLM's engine is made with."""
    model = config.model
    settings = {
        "dtype": dtype,
        "max_model_len": model.max_len,
        "max_num_seqs": MAX_SEQUENCES,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_lora_rank": min(n for n in LORA_RANKS if n >= model.lora_rank),
        "max_loras": 1,
        "seed": config.seed,
        # Of the distribution that was sampled from, temperature included.
        "logprobs_mode": "processed_logprobs",
        # None of the model's own top-p or top-k.
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        # Of a Qwen3-VL its tower is not loaded, nor the tokenizer that pictures would need.
        "language_model_only": True,
        "enforce_eager": device.type == "cpu",
        "enable_sleep_mode": device.type == "cuda",
    }
    if ranks.world() > 1:
        # Of several ranks, each has an engine of its own on its own card.
        settings["distributed_executor_backend"] = "external_launcher"
    if model.quantize == "nf4":
        # This vLLM reads no nf4, and has no room for all of a large base in 16 bits; truncated
        # importance weights are for the difference.
        settings["quantization"] = "fp8_per_channel"
    if device.type == "cuda":
        settings["gpu_memory_utilization"] = config.rollout.gpu_memory
    else:
        # The CPU build breaks on a prompt with a seed that it reads in parts ("CPU Generator does
        # not use offset").
        settings["enable_chunked_prefill"] = False
        settings["max_num_batched_tokens"] = max(model.max_len, 4096)
    return settings


def engine_dtype(config: Config, device: torch.device, bf16: bool) -> str:
    """In what vLLM multiplies: bfloat16 where training does (`bf16`), else `model.dtype`.

    SystemExit: float32 on a GPU, where vLLM's kernels for an adapter take 16 bits alone.
    """
    dtype = "bfloat16" if bf16 or config.model.quantize == "nf4" else config.model.dtype
    if device.type == "cuda" and dtype == "float32":
        raise SystemExit(
            "error: on a GPU vLLM takes an adapter in 16 bits only, and this run multiplies in "
            "float32; set model.autocast=true (weights stay in float32), or model.dtype=bfloat16, "
            "or rollout.engine=transformers"
        )
    return dtype


class VllmEngine:
    """vLLM inside the trainer's process, one engine a rank.

    It holds the frozen policy of a folder, and the adapter under a new name each version.
    lib/sampler.py's sample_rollouts queues turns here; lib/engine_check.py's sync_sampler hands
    over the adapter.
    """

    def __init__(self, folder: Path | str, config: Config, device: torch.device, bf16: bool):
        """folder: the policy without an adapter; bf16: whether training multiplies in bfloat16.

        SystemExit: vLLM is not installed, or would have to multiply in float32 on a GPU.
        """
        dtype = engine_dtype(config, device, bf16)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError as e:
            raise SystemExit(
                f"error: rollout.engine is vllm, which cannot be imported ({e}); on a GPU: pip "
                "install -r requirements-gpu.txt; on a CPU: see the README; or set "
                "rollout.engine=transformers"
            ) from e
        if device.type == "cuda":
            # vLLM counts what is free on the card, and PST's memory is still torch's.
            gc.collect()
            torch.cuda.empty_cache()
        model = config.model
        # Then its numbers are the trainer's but for 1e-5.
        self.exact = dtype == model.dtype == "float32" and model.quantize == "none"
        self.sleeps = device.type == "cuda"
        self.llm = LLM(str(folder), **engine_settings(config, device, dtype))
        self.engine = self.llm.llm_engine
        # The adapter as vLLM knows it, and its weights as one vector.
        self.adapter = None
        self.weights = None
        # Tokens of prompts since the last cached_share: all, and those from the prefix cache.
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.folder = tempfile.TemporaryDirectory(prefix="adapter-")

    def busy(self) -> bool:
        """Whether turns are queued that have not ended."""
        return self.engine.has_unfinished_requests()

    def submit(
        self,
        name: str,
        ids: list[int],
        max_tokens: int,
        temperature: float,
        seed: int,
        stop: int,
    ) -> None:
        """Queue one turn: at most max_tokens after `ids`, ended by the token `stop`.

        vLLM reads what is in its prefix cache only once.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=[stop],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=ids)
        self.engine.add_request(name, prompt, lora_request=self.adapter, params=params)

    def step(self) -> list[tuple[str, list[int], list[float]]]:
        """One pass of the engine over all that is queued.

        Returns the turns that ended in it: (name, ids, their log-probabilities).
        """
        turns = []
        for request in self.engine.step():
            if not request.finished:
                continue
            self.prompt_tokens += len(request.prompt_token_ids)
            self.cached_tokens += request.num_cached_tokens
            output = request.outputs[0]
            tokens = list(output.token_ids)
            logprobs = [found[t].logprob for t, found in zip(tokens, output.logprobs)]
            turns.append((request.request_id, tokens, logprobs))
        return turns

    def answers(
        self, tokenizer, prompts: list[list[int]], max_new_tokens: int = 96
    ) -> list[list[int]]:
        """Greedy answers to prompts (lists of ids), as lists of ids without the end of turn."""
        stop = tokenizer.eos_token_id
        for i, ids in enumerate(prompts):
            self.submit(str(i), ids, max_new_tokens, 0.0, 0, stop)
        said = {}
        while self.busy():
            for name, ids, _ in self.step():
                said[int(name)] = ids[:-1] if ids[-1] == stop else ids
        return [said[i] for i in range(len(prompts))]

    def score(self, rollout: Rollout, adapter: bool = True) -> torch.Tensor:
        """Log-probabilities, (n,) in nats, of a rollout's tokens with loss mask 1.

        Of the model at temperature 1, with the adapter that it holds or without any. The rollout is
        read in one pass, as a prompt is, and must leave room for one token more. Nothing else may
        be queued.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = TokensPrompt(prompt_token_ids=rollout.ids)
        request = self.adapter if adapter else None
        self.engine.add_request("score", prompt, lora_request=request, params=params)
        read = None
        while self.busy():
            for done in self.engine.step():
                if done.finished:
                    read = done.prompt_logprobs
        places = [i for i, of_agent in enumerate(rollout.loss_mask) if of_agent]
        return torch.tensor([read[i][rollout.ids[i]].logprob for i in places])

    def cached_share(self) -> float:
        """Share of the prompts' tokens since the last call that came from the prefix cache."""
        share = self.cached_tokens / max(1, self.prompt_tokens)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        return share

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer: weights to the host, keys and values dropped.

        A CPU build has no such mode.
        """
        if self.sleeps:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Take the memory back before the next adapter comes.

        First goes back to the card what torch keeps of the update's memory for its next tensors.
        """
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up()

    def take_adapter(self, policy: torch.nn.Module, changed: bool = True) -> None:
        """Load the policy's adapter under a new name and id; the old one goes.

        Cached keys and values go as well: they are the old adapter's. changed: whether the update
        must have moved the adapter. SystemExit if it has not, or if vLLM does not take the adapter.
        """
        from vllm.lora.request import LoRARequest

        parts = [
            p.detach().float().flatten().cpu()
            for name, p in policy.named_parameters()
            if "lora_" in name
        ]
        weights = torch.cat(parts)
        if self.weights is not None and torch.equal(weights, self.weights):
            if not changed:
                return
            raise SystemExit(
                "error: an adapter sync without a change: the adapter that goes to vLLM is the one "
                "that it has; the update did not reach the policy's weights"
            )
        old = self.adapter
        version = old.lora_int_id + 1 if old else 1
        path = os.path.join(self.folder.name, str(version))
        policy.save_pretrained(path)
        self.adapter = LoRARequest(f"policy-{version}", version, path)
        self.weights = weights
        if old:
            self.engine.remove_lora(old.lora_int_id)
            shutil.rmtree(old.lora_path)
        if not (self.engine.add_lora(self.adapter) and self.llm.reset_prefix_cache()):
            raise SystemExit(
                f"error: vLLM did not take version {version} of the adapter, or kept old keys and "
                "values of its prefix cache"
            )
