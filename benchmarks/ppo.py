"""Seconds and memory of PPO iterations through the public trainer, with its statistics and its log, on seeded random models.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true python benchmarks/ppo.py [--size s] [--eos-hazard 0.04] [--epochs 4] [--iters 3]

Prints one line, `RESULT {json}`: per iteration, wall and CPU seconds of

    generate   PPOTrainer.rollout: sampled answers with their log-probabilities and values, and the answers' texts
    score      the reward model's scores; what `step` does before its update: the reference's log-probabilities, rewards, advantages
    train      the update, `epochs` x minibatches; statistics; the metrics' line in metrics.jsonl
    total      all of it

and `peak_rss_mb` of the whole process, imports included. Settings are those of a plain PPO: temperature 1, KL coefficient 0.05 fixed,
gamma 1, lambda 0.95, vf_coef 0.1, no clipping of gradients, AdamW with the weight decay 0.01 that is torch's default (here, as always
in this project, on matrices alone), a frozen copy of the starting policy as reference, a GPT-Neo sequence classifier as reward model.
It reads the sampled tokens themselves: rewritten from texts, they would be others than those that other contenders score.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml

import common.models.prepacked
import rlhf.ppo.rollout
from benchmarks.synthetic import (
    CpuLog,
    argument_parser,
    build_judge,
    build_policy,
    build_prompts,
    build_tokenizer,
    peak_rss_mib,
    phase_seconds,
    print_result,
    result,
    vocabulary,
)
from common.checkpoint import new_manifest
from common.freezing import apply_freezing
from common.models.backbone import RewardInput
from common.models.fused import set_fused
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import ReadoutSettings
from common.schema import FreezeSettings, GenerateParams
from common.tracking import Tracker
from rlhf.ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf.ppo.metrics import METRICS
from rlhf.ppo.models import Critic
from rlhf.ppo.rollout import Rollout

FAST_PARTS = {
    "fused": "fused attention and activation",
    "sampled": "log-probabilities and values kept from sampling",
    "line": "texts one behind the other instead of padded rows",
    "lower": "frozen layers run once per batch",
    "room": "a cache with room for the answer",
    "dropping": "rows that ended leave the batch",
    "prepacked": "weights laid out for the matrix kernels",
}
"""What `--without` takes out."""


def leave_out(parts: Sequence[str]) -> None:
    """Those fast parts that are no setting: they have no reason to be off but to be measured."""
    if "room" in parts:
        rlhf.ppo.rollout.make_room = lambda cache, tokens: None
    if "dropping" in parts:
        rlhf.ppo.rollout.COMPACT_BELOW = 0.0
    if "prepacked" in parts:
        common.models.prepacked._available = lambda dtype: False  # type: ignore[assignment]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--top", type=int, metavar="K", help="train the K upper layers, norms and value head alone (default: everything)")
    parser.add_argument("--critic", action="store_true", help="a critic of its own, of the policy's size, instead of a value head")
    parser.add_argument(
        "--bf16", action="store_true", help="matrix products in bfloat16 over float32 weights; the judge's weights in bfloat16"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=FAST_PARTS,
        help="leave out fast parts: " + ", ".join(f"{name} ({what})" for name, what in FAST_PARTS.items()),
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other fields of PPOConfig")
    return parser.parse_args(argv)


def trainer_config(options: argparse.Namespace) -> PPOConfig:
    settings: dict[str, Any] = {
        "learning_rate": options.lr,
        "weight_decay": 0.01,
        "batch_size": options.batch,
        "mini_batch_size": options.minibatch,
        "ppo_epochs": options.epochs,
        "init_kl_coef": 0.05,
        "adap_kl_ctrl": False,
        "gamma": 1.0,
        "lam": 0.95,
        "vf_coef": 0.1,
        "max_grad_norm": None,
        "classic_quirks": False,
        "mixed_precision": "bf16" if options.bf16 else "no",
        "padding_free": "line" not in options.without,
        "cache_frozen_layers": "lower" not in options.without,
    }
    for text in options.set:
        name, _, value = text.partition("=")
        if name not in {field.name for field in fields(PPOConfig)}:
            raise SystemExit(f"--set {name}: PPOConfig has no such field")
        settings[name] = yaml.safe_load(value)
    return PPOConfig(**settings)


def build_trainer(options: argparse.Namespace, tokenizer: Any) -> PPOTrainer:
    policy = build_policy(options.size, eos_hazard=options.eos_hazard)
    set_fused(policy, "fused" not in options.without)
    model = AutoModelForCausalLMWithValueHead(policy)
    if options.top is not None:
        below = FreezeSettings(
            freeze_emb=True, freeze_attn=True, freeze_ff=True, freeze_ln=True, layers_not_to_freeze=list(range(-options.top, 0))
        )
        apply_freezing(model, below, always_train=("v_head", "pretrained_model.transformer.ln_f"))
    critic = None
    if options.critic:
        critic = Critic.from_reward_model(build_reward_model(options, seed=2))
    return PPOTrainer(trainer_config(options), model, tokenizer=tokenizer, critic=critic)


def build_reward_model(options: argparse.Namespace, *, seed: int = 1) -> RewardModel:
    """The classifier as this project's reward model: its transformer, and its head as the readout of the last token."""
    classifier = build_judge(options.size, seed=seed)
    set_fused(classifier, "fused" not in options.without)
    model = RewardModel(classifier.transformer, ReadoutSettings(), seed=0)
    model.readout.load_state_dict({"score.weight": classifier.score.weight})
    return model.eval()


def judge(scorer: RewardScorer, rollout: Rollout) -> list[float]:
    return scorer.score_inputs([RewardInput(query + response) for query, response in zip(rollout.queries, rollout.responses, strict=True)])


class Measured(NamedTuple):
    iterations: list[dict[str, float]]
    """Figures of the iterations that count."""
    lengths: list[list[tuple[int, int]]]
    """Tokens (prompt, answer) of every row, iteration by iteration."""
    parameters: int
    """Of the policy."""
    start_rss_mib: float
    """Most memory of the process before its first iteration."""


def measure(options: argparse.Namespace, folder: Path) -> Measured:
    """Run the iterations; metrics go to `folder`."""
    torch.set_num_threads(options.threads)
    leave_out(options.without)
    tokenizer = build_tokenizer(vocabulary(options.size))
    trainer = build_trainer(options, tokenizer)
    manifest = new_manifest("reward_classification", tokenizer, readout={"name": "last_token"})
    reward_model = build_reward_model(options)
    if options.bf16:
        reward_model.backbone.to(torch.bfloat16)  # as reward_config.model_dtype: bfloat16 loads it
    scorer = RewardScorer(reward_model, device=trainer.current_device, tokenizer=tokenizer, manifest=manifest)
    generation = GenerateParams(max_new_tokens=options.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    prompts = build_prompts(options.batch * (options.warmup + options.iters))
    start_rss = peak_rss_mib()
    iterations: list[dict[str, float]] = []
    lengths: list[list[tuple[int, int]]] = []
    with CpuLog() as cpu, Tracker.start(folder, stage="rlhf", config=vars(options)) as tracker:
        for step in range(options.warmup + options.iters):
            begun = time.perf_counter()
            first = step * options.batch
            rollout = trainer.rollout(prompts[first : first + options.batch], generation, seed=0, step=step)
            generated = time.perf_counter()
            scores = judge(scorer, rollout)
            kept = None if "sampled" in options.without else rollout
            stats = trainer.step(rollout.queries, rollout.responses, scores, temperature=generation.temperature, sampled=kept)
            prepared = time.perf_counter() - stats["time/ppo/optimize"]
            figures = {name: value for name, value in stats.items() if name in METRICS}
            tracker.log({**figures, "train/score": sum(scores) / len(scores), "train/eos_rate": sum(rollout.ended) / len(rollout)}, step)
            iterations.append(phase_seconds((begun, generated, prepared, time.perf_counter()), cpu, sum(map(len, rollout.responses))))
            lengths.append([(len(query), len(response)) for query, response in zip(rollout.queries, rollout.responses, strict=True)])
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return Measured(iterations[options.warmup :], lengths[options.warmup :], parameters, start_rss)


def contender(options: argparse.Namespace) -> str:
    """What the options make of it, in a word: `ours-top2-bf16`."""
    parts = ["ours", *(f"top{options.top}" for _ in range(options.top is not None)), *["critic"] * options.critic, *["bf16"] * options.bf16]
    return "-".join([*parts, *(f"no_{part}" for part in options.without), *options.set])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    more = {"params": found.parameters, "start_rss_mb": round(found.start_rss_mib)}
    print_result(result(contender(options), options.size, options.batch, found.iterations, **more))
    return 0


if __name__ == "__main__":
    sys.exit(main())
