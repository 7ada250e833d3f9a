"""Settings that trl's PPO trainers have and `PPOConfig` has not, each with what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_CHUNKED = "forwards are bounded by tokens, so there is no cache to empty; leave it out"
_COMPUTED = "the trainer works it out; leave it out"

ELSEWHERE: dict[str, str] = {
    # trl 0.11.4
    "forward_batch_size": "use mini_batch_size",
    "backward_batch_size": f"mini_batch_size x gradient_accumulation_steps; {_COMPUTED}",
    "global_backward_batch_size": _COMPUTED,
    "global_batch_size": _COMPUTED,
    "world_size": _COMPUTED,
    "is_encoder_decoder": "the model tells; leave it out",
    "is_peft_model": "the model tells; leave it out",
    "optimize_cuda_cache": _CHUNKED,
    "optimize_device_cache": _CHUNKED,
    "accelerator_kwargs": "use PPOConfig(mixed_precision=…), or PPOTrainer(runtime=Runtime.local(DEVICE)) of common.launch.runtime",
    "push_to_hub_if_best_kwargs": "use PPOTrainer.train(save_to=FOLDER), which keeps the best model, and huggingface_hub.upload_folder",
    "compare_steps": "it belonged to push_to_hub_if_best_kwargs; leave it out",
    "dataset_num_proc": "map the dataset before it is passed: dataset.map(…, num_proc=…)",
    # trl.experimental.ppo
    "kl_coef": "use init_kl_coef, with adap_kl_ctrl=False for a fixed one",
    "kl_estimator": "use kl_penalty: kl is k1, k3 is k3",
    "num_ppo_epochs": "use ppo_epochs",
    "num_mini_batches": "use mini_batch_size x gradient_accumulation_steps: the answers of an optimizer step",
    "per_device_train_batch_size": "use mini_batch_size for the answers of a forward, batch_size for those of a step",
    "total_episodes": "use steps: total_episodes / batch_size",
    "num_train_epochs": "use PPOTrainer.train(epochs=…)",
    "local_rollout_forward_batch_size": "forwards without gradient are bounded by tokens; leave it out",
    "num_sample_generations": "use PPOTrainer.train(eval_prompts=…, eval_every=…, samples_logged=…)",
    "response_length": "use PPOTrainer.train(generation={'max_new_tokens': …})",
    "stop_token": "EOS always ends an answer; PPOTrainer.train(generation={'stop_strings': [TEXT]}) adds texts that do",
    "stop_token_id": "use PPOTrainer.train(generation={'eos_token_id': ID})",
    "temperature": "use PPOTrainer.train(generation={'temperature': …}), or generate(temperature=…) and step(temperature=…)",
    "missing_eos_penalty": "use PPOTrainer.train(missing_eos_penalty=…); step takes the scores as they are",
    "sft_model_path": "load the model: AutoModelForCausalLMWithValueHead.from_pretrained(PATH)",
    "reward_model_path": "use PPOTrainer(reward=PATH)",
    "output_dir": "use PPOTrainer.train(save_to=FOLDER)",
    "report_to": "use log_with",
}
"""Name -> what to do instead."""


CONFIG_METHODS: dict[str, str] = {
    "to_dict": "use dataclasses.asdict(config)",
    "total_ppo_epochs": "steps of PPOTrainer.train are PPO steps (batches) already",
}
"""What else trl's config had."""


def unknown_lines(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """A line for each setting that `PPOConfig` has not: what to do instead of one of trl's, what else may have been meant."""
    lines = []
    for name in names:
        if name in ELSEWHERE:
            lines.append(f"PPOConfig has no {name}: {ELSEWHERE[name]}")
        elif name not in known:
            lines.append(f"PPOConfig has no {name}")
            for close in difflib.get_close_matches(name, [*known, *ELSEWHERE], n=1):
                lines[-1] += f"; did you mean {close}?" + (f" {close}: {ELSEWHERE[close]}" if close in ELSEWHERE else "")
    return lines
