"""vLLM as the sampler of train_vrl.py (`rollout.engine: vllm`): what is asked of it, in one place. Its loop over turns is train_vrl.play_in_vllm.

Written against vLLM 0.32; run here with its CPU build only. vLLM is imported when an engine is made, so that everything loads without it.
"""

import gc
import os
import shutil
import tempfile
from collections import Counter

import torch

from lib import ranks
from lib.rollout import extend, go_on
from lib.runs import seeded_rng

KV_GIB = 1  # of KV cache, on a CPU
MAX_ROWS = 256  # sequences that are decoded at once


def play_in_vllm(engine, rollouts, envs, tokenizer, config, temperature, seed, bar):
    """Continuous batching over turns: the moment a turn ends, the environment replies and the next turn is queued; nobody waits for the others.

    Seeds are of the rollout and turn, so what one samples does not depend on the others (but for rounding, in bfloat16).
    """
    settings, members, turns = config.rollout, Counter(), Counter()
    names = []
    for out in rollouts:
        names.append((out.task["id"], members[out.group_id]))
        members[out.group_id] += 1

    def queue(r):
        out = rollouts[r]
        room = min(
            settings.max_turn_tokens,
            config.model.max_len - len(out.ids),
        )
        engine.submit(
            f"{r}-{turns[r]}",
            out.ids,
            room,
            temperature,
            seeded_rng(seed, *names[r], turns[r]).getrandbits(31),
            tokenizer.eos_token_id,
        )
        turns[r] += 1

    for r in range(len(rollouts)):
        queue(r)
    while engine.engine.has_unfinished_requests():
        for name, tokens, logprobs in engine.step():
            r = int(name.split("-")[0])
            cut = next(
                (i for i, t in enumerate(tokens, 1) if t >= len(tokenizer)), None
            )  # a padded row of the vocabulary ends the episode
            extend(rollouts[r], tokens[:cut], trained=True, logprobs=logprobs[:cut])
            if go_on(rollouts[r], envs[r], tokenizer, config) is None:
                bar.update()
            else:
                queue(r)
    bar.close()
    return rollouts


class VllmEngine:
    """vLLM inside the trainer's process, one engine a rank: the frozen policy of a folder, and the adapter under a new name each version.

    train_vrl.py's sample_rollouts queues turns here, its sync_sampler hands over the adapter.
    """

    def __init__(self, folder, config, device, bf16):
        """folder: the policy without an adapter; bf16: whether training multiplies in bfloat16. SystemExit: no vLLM here."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError as e:
            raise SystemExit(
                f"error: rollout.engine is vllm, which cannot be imported ({e}); on a GPU: pip install -r requirements-gpu.txt; on a CPU: "
                "see the README; or set rollout.engine=transformers"
            ) from e
        if (
            device.type == "cuda"
        ):  # vLLM counts what is free on the card, and PST's memory is still torch's
            gc.collect()
            torch.cuda.empty_cache()
        r, m = config.rollout, config.model
        dtype = "bfloat16" if bf16 or m.quantize == "nf4" else m.dtype
        self.exact = (
            dtype == m.dtype == "float32" and m.quantize == "none"
        )  # then its numbers are the trainer's but for 1e-5
        self.sleeps = device.type == "cuda"
        rank = min(
            n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= m.lora_rank
        )  # the sizes that it has room for
        # external_launcher: of several ranks, each has an engine of its own on its own card.
        several = {"distributed_executor_backend": "external_launcher"} if ranks.world() > 1 else {}
        # enable_chunked_prefill: the CPU build breaks on a prompt with a seed that it reads in parts ("CPU Generator does not use offset").
        # fp8: this vLLM reads no nf4, and has no room for all of a large base in 16 bits; truncated importance weights are for the difference.
        # language_model_only: of a Qwen3-VL its tower is not loaded, nor the tokenizer that pictures would need.
        # processed_logprobs: of the distribution that was sampled from, temperature included. generation_config: none of the model's own top-p or top-k.
        self.llm = LLM(
            str(folder),
            dtype=dtype,
            max_model_len=m.max_len,
            max_num_seqs=MAX_ROWS,
            enable_prefix_caching=True,
            enable_lora=True,
            max_lora_rank=rank,
            max_loras=1,
            seed=config.seed,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            skip_tokenizer_init=True,
            language_model_only=True,
            enforce_eager=device.type == "cpu",
            enable_sleep_mode=self.sleeps,
            **several,
            **({"quantization": "fp8_per_channel"} if m.quantize == "nf4" else {}),
            **(
                {"gpu_memory_utilization": r.gpu_memory}
                if device.type == "cuda"
                else {
                    "enable_chunked_prefill": False,
                    "max_num_batched_tokens": max(m.max_len, 4096),
                }
            ),
        )
        self.engine, self.adapter, self.weights, self.read, self.cached = (
            self.llm.llm_engine,
            None,
            None,
            0,
            0,
        )
        self.folder = tempfile.TemporaryDirectory(prefix="adapter-")

    def submit(self, name, ids, max_tokens, temperature, seed, stop):
        """Queue one turn: at most max_tokens after `ids`, ended by the token `stop`. vLLM reads what is in its prefix cache only once."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self.engine.add_request(
            name,
            TokensPrompt(prompt_token_ids=ids),
            lora_request=self.adapter,
            params=SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=max_tokens,
                logprobs=0,
                stop_token_ids=[stop],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )

    def answers(self, tokenizer, prompts, max_new_tokens=96):
        """Greedy answers to prompts (lists of ids), as lists of ids without the end of turn."""
        stop = tokenizer.eos_token_id
        for i, ids in enumerate(prompts):
            self.submit(str(i), ids, max_new_tokens, 0.0, 0, stop)
        said = {}
        while self.engine.has_unfinished_requests():
            said.update((int(name), ids) for name, ids, _ in self.step())
        return [said[i][:-1] if said[i][-1] == stop else said[i] for i in range(len(prompts))]

    def step(self):
        """One pass of the engine over all that is queued: the turns that ended in it, as (name, ids, their log-probabilities)."""
        ended = [x for x in self.engine.step() if x.finished]
        self.read += sum(len(x.prompt_token_ids) for x in ended)
        self.cached += sum(x.num_cached_tokens for x in ended)
        said = [(x.request_id, x.outputs[0]) for x in ended]
        return [
            (name, list(o.token_ids), [p[t].logprob for t, p in zip(o.token_ids, o.logprobs)])
            for name, o in said
        ]

    def cached_share(self):
        """Share of the prompts' tokens since the last call that were read from the prefix cache."""
        share, self.read, self.cached = self.cached / max(1, self.read), 0, 0
        return share

    def sleep(self):
        """Give the GPU's memory to the trainer: weights go to the host, keys and values are dropped. A CPU build has no such mode."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def wake(self):
        """Take the memory back before the next adapter comes: what torch keeps of the update's for its next tensors goes back to the card first."""
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up()

    def take_adapter(self, policy):
        """Load the policy's adapter under a new name and id, drop the old one and all cached keys and values. SystemExit if nothing has changed."""
        from vllm.lora.request import LoRARequest

        weights = torch.cat(
            [
                p.detach().float().flatten().cpu()
                for n, p in policy.named_parameters()
                if "lora_" in n
            ]
        )
        if self.weights is not None and torch.equal(weights, self.weights):
            raise SystemExit(
                "error: an adapter sync without a change: the adapter that goes to vLLM is the one that it has; the update did not reach "
                "the policy's weights"
            )
        version, old = self.adapter.lora_int_id + 1 if self.adapter else 1, self.adapter
        path = os.path.join(self.folder.name, str(version))
        policy.save_pretrained(path)
        self.adapter, self.weights = LoRARequest(f"policy-{version}", version, path), weights
        if old:
            self.engine.remove_lora(old.lora_int_id)
            shutil.rmtree(old.lora_path)
        if not (self.engine.add_lora(self.adapter) and self.llm.reset_prefix_cache()):
            raise SystemExit(
                f"error: vLLM did not take version {version} of the adapter, or kept old keys and values of its prefix cache"
            )
