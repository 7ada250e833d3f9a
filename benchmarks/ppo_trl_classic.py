"""The classic `PPOTrainer.step` of trl 0.11.4, measured as benchmarks/ppo.py measures ours. Runs in the environment `classic`.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true .bench/classic/bin/python benchmarks/ppo_trl_classic.py [--one-by-one]

Phases come from the trainer's own times: `score` is the reward model and, of `step`, forward pass, rewards and advantages.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")

import torch

from benchmarks.synthetic import (
    EOS,
    PAD,
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
    parser = argument_parser(__doc__)
    parser.add_argument("--one-by-one", action="store_true", help="generate and score one prompt at a time")
    options = parser.parse_args(argv)
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.set_num_threads(options.threads)
    policy, reference = (AutoModelForCausalLMWithValueHead(build_policy(options.size, eos_hazard=options.eos_hazard)) for _ in range(2))
    policy.is_peft_model = reference.is_peft_model = False
    judge = build_judge(options.size).eval()
    config = PPOConfig(
        batch_size=options.batch,
        mini_batch_size=options.minibatch,
        ppo_epochs=options.epochs,
        learning_rate=options.lr,
        init_kl_coef=0.05,
        adap_kl_ctrl=False,
    )
    trainer = PPOTrainer(config, policy, reference.eval(), build_tokenizer())
    sampling = {
        "max_new_tokens": options.new_tokens,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    prompts = build_prompts(options.batch * (options.warmup + options.iters))
    torch.manual_seed(0)
    iterations = []
    with CpuLog() as cpu:
        for first in range(0, len(prompts), options.batch):
            queries = [torch.tensor(prompt) for prompt in prompts[first : first + options.batch]]
            begun = time.perf_counter()
            if options.one_by_one:
                responses = [trainer.generate(query, return_prompt=False, **sampling)[0] for query in queries]
            else:
                responses = trainer.generate(queries, batch_size=options.batch, return_prompt=False, **sampling)
            generated = time.perf_counter()
            texts = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            with torch.no_grad():
                if options.one_by_one:
                    scores = [judge(input_ids=text[None]).logits[0, 0] for text in texts]
                else:
                    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
                    mask = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
                    scores = list(judge(input_ids=ids, attention_mask=mask.long()).logits[:, 0])
            judged = time.perf_counter()
            stats = trainer.step(queries, responses, scores)
            prepared = judged + sum(float(stats[f"time/ppo/{part}"]) for part in ("forward_pass", "compute_rewards", "compute_advantages"))
            iterations.append(phase_seconds((begun, generated, prepared, time.perf_counter()), cpu, sum(map(len, responses))))
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    name = "trl-classic-one-by-one" if options.one_by_one else "trl-classic"
    print_result(result(name, options.size, options.batch, iterations[options.warmup :], params=parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
