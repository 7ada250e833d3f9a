"""What the fused parts of common/models/fused.py and the fused AdamW gain, alone and together, on GPT-Neo shapes.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true python benchmarks/architecture.py [--shapes 256x8x8,64x2x4] [--rounds 5] [--threads 1]

A shape is hidden size x layers x heads. All variants run the same weights in one process, in turn, and the quickest of the rounds counts:
other processes on the machine then disturb all of them alike. Prints seconds and, as `xN`, how many times faster than transformers' own
code; for a forward and backward pass also the bytes kept between the two. Weights are random, float32; nothing is asserted about time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from common.models.fused import set_fused
from common.models.load import alternating_attention
from common.optim import make_optimizer

VOCABULARY = 4096
WINDOW = 64
VARIANTS = ("transformers", "gelu", "attention", "both")


def build(shape: str) -> GPTNeoForCausalLM:
    """A model of `hidden x layers x heads` with local and global attention in turn."""
    hidden, layers, heads = (int(number) for number in shape.split("x"))
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        attention_types=alternating_attention(layers),
        window_size=WINDOW,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return GPTNeoForCausalLM(config).eval()


def choose(model: GPTNeoForCausalLM, variant: str) -> None:
    """Fuse nothing, one kind of part, or both."""
    for block in model.transformer.h:
        set_fused(block.mlp, variant in ("gelu", "both"))
        set_fused(block.attn, variant in ("attention", "both"))


def forward_backward(model: GPTNeoForCausalLM, ids: Tensor, mask: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100).flatten()).backward()


@torch.no_grad()
def forward(model: GPTNeoForCausalLM, ids: Tensor, mask: Tensor) -> None:
    model(input_ids=ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def generate(model: GPTNeoForCausalLM, ids: Tensor, mask: Tensor) -> None:
    """As many new tokens as the prompts have, which are padded left."""
    torch.manual_seed(0)
    half = ids.shape[1] // 2
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": half, "eos_token_id": None, "pad_token_id": 0}
    model.generate(input_ids=ids[:, :half], attention_mask=mask.flip(1)[:, -half:], **options)


def kept_bytes(model: GPTNeoForCausalLM, ids: Tensor, mask: Tensor) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(model, ids, mask)
    return sum(kept.values())


def quickest(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each run, the least of `rounds` in which all take turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: min(values) for name, values in seconds.items()}


def report(title: str, seconds: dict[str, float], more: dict[str, str] | None = None) -> None:
    first = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"  {name:<14} {1e3 * value:9.2f} ms  x{first / value:.2f}  {(more or {}).get(name, '')}".rstrip(), flush=True)


def measure(shape: str, batch: int, tokens: int, rounds: int) -> None:
    model = build(shape)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (batch,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    print(f"\n== {shape}, batch {batch}, {tokens} tokens, rows of {tokens // 2} to {tokens} tokens padded right")

    def variants(run: Callable[[GPTNeoForCausalLM, Tensor, Tensor], None]) -> dict[str, float]:
        def one(variant: str) -> Callable[[], None]:
            def chosen() -> None:
                choose(model, variant)
                run(model, ids, mask)

            return chosen

        return quickest({variant: one(variant) for variant in VARIANTS}, rounds)

    kept = {}
    for variant in VARIANTS:
        choose(model, variant)
        kept[variant] = f"{kept_bytes(model, ids, mask) / 2**20:7.1f} MiB kept for backward"
    report("forward and backward", variants(forward_backward), kept)
    report("forward without gradients", variants(forward))
    report(f"transformers' generate, {tokens // 2} prompt and {tokens // 2} new tokens", variants(generate))

    forward_backward(model, ids, mask)
    looped = torch.optim.AdamW(model.parameters(), lr=1e-9, foreach=False)
    together = torch.optim.AdamW(model.parameters(), lr=1e-9, foreach=True)
    fused = make_optimizer(model, learning_rate=1e-9)
    report("AdamW step", quickest({"loop": looped.step, "foreach": together.step, "fused": fused.step}, rounds))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="256x8x8,64x2x4", help="hidden x layers x heads, separated by commas")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, least of {options.rounds} rounds"
    )
    for shape in options.shapes.split(","):
        measure(shape, options.batch, options.tokens, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
