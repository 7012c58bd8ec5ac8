"""Peak memory of log-probabilities with gradients, by lib.policy.token_logprobs (chunked) or by
lib.policy.plain_logprobs, which has all logits at once. Not a test.

    python tests/measure_logprobs.py chunked 8192 151936
    python tests/measure_logprobs.py plain 8192 151936        # 15 GiB
A random Qwen3 of 2 layers, 256 wide; every position is a loss position. On a GPU torch's peak is
read, on a CPU the process's.
"""

import math
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.policy import plain_logprobs, token_logprobs  # noqa: E402
from lib.runs import peak_memory_gib  # noqa: E402

WAYS = {"chunked": token_logprobs, "plain": plain_logprobs}


def small_model(vocabulary):
    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(shape)


def peak_gib(device):
    """The highest memory so far: torch's on a GPU, this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory_gib() or math.nan


def main():
    way, length, vocabulary = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = small_model(vocabulary).to(device)
    ids = torch.randint(vocabulary, (1, length), device=device)
    positions = torch.arange(length, device=device)[None]
    mask = torch.ones(1, length - 1, device=device)

    before = peak_gib(device)
    began = time.time()
    logprobs = WAYS[way](model, ids, positions, mask)
    logprobs.sum().backward()
    seconds = time.time() - began
    gradient = model.model.embed_tokens.weight.grad
    print(
        f"{way}: 1 x {length} tokens, vocabulary {vocabulary:,}, {device.type}: "
        f"peak {peak_gib(device):.2f} GiB, of it {before:.2f} before; {seconds:.1f} s; "
        f"sum {float(logprobs.detach().sum()):.4f}, gradient norm {float(gradient.norm()):.6f}"
    )


if __name__ == "__main__":
    main()
