"""`trl.experimental.ppo.PPOTrainer` of trl 1.12, its last, measured as benchmarks/ppo.py measures ours. Runs in the environment `ppo`.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true .bench/ppo/bin/python benchmarks/ppo_trl.py

It always trains a second model as critic: compare it with `--critic` of benchmarks/ppo.py and benchmarks/ppo_floor.py. It tells no
times, so two of its functions are watched: `batch_generation` ends generating, the whitening of advantages ends scoring.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from benchmarks.synthetic import (
    CpuLog,
    argument_parser,
    build_judge,
    build_policy,
    build_prompts,
    build_tokenizer,
    phase_seconds,
    print_result,
    result,
)


def main(argv: Sequence[str] | None = None) -> int:
    options = argument_parser(__doc__).parse_args(argv)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(options.threads)
    count = options.batch * (options.warmup + options.iters)
    policy = build_policy(options.size, eos_hazard=options.eos_hazard)
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    marks: list[float] = []
    tokens: list[int] = []
    iterations: list[dict[str, float]] = []

    def watched(function: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if first and not marks:
                marks.append(time.perf_counter())
            found = function(*arguments, **keywords)
            marks.append(time.perf_counter())
            if not first:
                tokens.append(int(arguments[1].sum()))  # the mask
            return found

        return call

    ppo_trainer.batch_generation = watched(ppo_trainer.batch_generation, first=True)
    ppo_trainer.masked_whiten = watched(ppo_trainer.masked_whiten, first=False)

    with CpuLog() as cpu, tempfile.TemporaryDirectory() as folder:

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = time.perf_counter()
                iterations.append(phase_seconds((*marks, now), cpu, tokens[-1]))
                marks[:] = [now]  # what the trainer still tidies up counts for the next iteration

        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=options.batch // options.minibatch,
            num_ppo_epochs=options.epochs,
            total_episodes=count,
            local_rollout_forward_batch_size=options.batch,
            num_sample_generations=0,
            response_length=options.new_tokens,
            stop_token="eos",
            temperature=1.0,
            kl_coef=0.05,
            learning_rate=options.lr,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10**6,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=build_policy(options.size, eos_hazard=options.eos_hazard).eval(),
            reward_model=build_judge(options.size).eval(),
            value_model=build_judge(options.size, seed=2),
            train_dataset=Dataset.from_dict({"input_ids": build_prompts(count)}),
            callbacks=[Clock()],
        )
        trainer.train()
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    print_result(result("trl-1.12", options.size, options.batch, iterations[options.warmup :], params=parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
