"""Peak memory of log-probabilities with gradients, the chunked way of train_pst.token_logprobs or the plain way: all logits at once. Not a test.

    python tests/measure_logprobs.py chunked 8192 151936
    python tests/measure_logprobs.py plain 8192 151936        # 15 GiB
A random Qwen3 of 2 layers, 256 wide; every position is a loss position. On a GPU torch's peak is read, on a CPU the process's.
"""

import resource
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.policy import token_logprobs  # noqa: E402


def main():
    way, length, vocabulary = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
    ).to(device)
    ids = torch.randint(vocabulary, (1, length), device=device)

    def memory():
        return (
            torch.cuda.max_memory_allocated() / 2**30
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )

    before, start = memory(), time.time()
    if way == "chunked":
        logprobs = token_logprobs(
            model,
            ids,
            torch.arange(length, device=device)[None],
            torch.ones(1, length - 1, device=device),
        )
    else:
        logprobs = (
            model(input_ids=ids, use_cache=False)
            .logits[:, :-1]
            .float()
            .log_softmax(-1)
            .gather(-1, ids[:, 1:, None])[..., 0]
        )
    logprobs.sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    print(
        f"{way}: 1 x {length} tokens, vocabulary {vocabulary:,}, {device.type}: peak {memory():.2f} GiB, of it {before:.2f} before; {time.time() - start:.1f} s; "
        f"sum {float(logprobs.detach().sum()):.4f}, gradient norm {float(gradient.norm()):.6f}"
    )


if __name__ == "__main__":
    main()
