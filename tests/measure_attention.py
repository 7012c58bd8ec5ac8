"""Time and memory of the ways to compute attention over packed rows, forward and backward.

    python tests/measure_attention.py                   # the two shapes of docs/gpu.md, on a GPU
    python tests/measure_attention.py 4 2 32 4 400      # heads, key heads, size, examples, tokens

A line a way: milliseconds (the median of ten passes), GiB of a GPU beyond the inputs, and the
largest difference from float32. A way that the device has not is left out.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import attention  # noqa: E402

# Query heads, key heads, size of one, examples, tokens of one.
SHAPES = {"SmolLM2-135M": (9, 3, 64, 16, 1024), "Qwen3-8B": (32, 8, 128, 8, 4096)}


def make_inputs(heads: int, kv_heads: int, width: int, tokens: int, device: str) -> list:
    """Query, key and value (1, heads, T, d) over (1, T, heads, d), in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    made = [torch.randn(1, tokens, n, width, device=device) for n in (heads, kv_heads, kv_heads)]
    return [x.to(dtype).transpose(1, 2).detach().requires_grad_() for x in made]


def ways_of(device: str) -> dict:
    """{name: (function of query, key, value, starts, scaling; whether key heads are copied)}."""
    ways = {
        "copied key heads": (attention.each_example, False),
        "grouped key heads": (attention.each_example, True),
    }
    if device == "cuda" and attention.has_varlen():
        ways["varlen"] = (attention.all_examples, True)
    return ways


def one_pass(function, inputs: list, starts: list[int]) -> torch.Tensor:
    """Forward and backward; the result."""
    for x in inputs:
        x.grad = None
    out = function(*inputs, starts, None)
    out.float().sum().backward()
    return out.detach()


def measure(function, inputs: list, starts: list[int], device: str) -> tuple[float, float]:
    """(milliseconds of a pass, GiB beyond what is there before it)."""
    seconds, before = [], 0
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        one_pass(function, inputs, starts)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return 1e3 * statistics.median(seconds), (peak - before) / 2**30


def main() -> None:
    """Measure the shapes asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = tuple(int(x) for x in sys.argv[1:])
    print(torch.cuda.get_device_name() if device == "cuda" else "a CPU, float32")
    for name, shape in {"given": given}.items() if given else SHAPES.items():
        heads, kv_heads, width, examples, tokens = shape
        inputs = make_inputs(heads, kv_heads, width, examples * tokens, device)
        starts = list(range(0, examples * tokens, tokens))
        exact = [x.detach().float() for x in inputs]
        right = attention.each_example(*exact, starts, None)
        print(f"{name}: {examples} examples of {tokens} tokens, {heads} and {kv_heads} x {width}")
        for way, (function, grouped) in ways_of(device).items():
            attention.reads_grouped_heads = lambda *_, grouped=grouped: grouped
            ms, gib = measure(function, inputs, starts, device)
            gap = (one_pass(function, inputs, starts).float() - right).abs().max()
            print(f"  {way:18} {ms:8.1f} ms  {gib:5.2f} GiB  {gap:.1e}")


if __name__ == "__main__":
    main()
