"""The statistics of one PPO step under their classic names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.ppo.masked import masked_mean, masked_moments, masked_sum
from rlhf.ppo.record import StepRecord

Stats = dict[str, Any]
COUNTED = {
    "skipped": "ppo/skipped_minibatches",
    "empty": "ppo/empty_minibatches",
    "not_finite": "ppo/not_finite_minibatches",
    "early_stopped": "ppo/early_stopped",
}
"""Figures of an update that are summed over the step's updates; all others are averaged."""


def step_statistics(record: StepRecord, updates: Sequence[dict[str, float]], *, kl_coef: float) -> Stats:
    """What a step did: `updates` are the figures of its optimizer steps (`Update.run`), `kl_coef` the coefficient it used.

    Numbers and tensors (`objective/kl_dist`, `tokens/…_dist` (B,), log-probabilities (B, T), advantages (N,)) alike are of the answers of
    all processes.
    """
    mask = record.mask
    kl_per_answer = torch.where(mask, record.kl, 0.0).sum(1)
    surprise = -masked_sum(record.logprobs, mask)
    score_mean, score_var = masked_moments(record.scores, torch.ones_like(record.scores))
    query_lengths = record.answers.lengths - record.answers.present.sum(1)
    if record.answers.encoder_mask is not None:
        query_lengths = record.answers.encoder_mask.sum(1)
    kl, surprise = (torch.stack([kl_per_answer.sum(), surprise]) / len(mask)).tolist()
    stats: Stats = {
        "objective/kl": kl,
        "objective/kl_dist": kl_per_answer,
        "objective/logprobs": record.logprobs,
        "objective/ref_logprobs": record.ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": surprise,
        "ppo/mean_non_score_reward": float(masked_mean(record.non_score_rewards, mask)),
        "ppo/mean_scores": float(score_mean),
        "ppo/std_scores": float(score_var.sqrt()),
        "ppo/policy/advantages": record.advantages[mask],
    }
    for name, lengths in (("queries", query_lengths), ("responses", record.answers.present.sum(1))):
        mean, var = masked_moments(lengths.float(), torch.ones_like(lengths))
        stats |= {f"tokens/{name}_len_mean": float(mean), f"tokens/{name}_len_std": float(var.sqrt()), f"tokens/{name}_dist": lengths}
    with_tokens = [update for update in updates if not (update["empty"] or update["not_finite"])] or updates
    for name in updates[0]:
        if name in COUNTED:
            stats[COUNTED[name]] = sum(update[name] for update in updates)
        else:
            stats[f"ppo/{name}"] = sum(update[name] for update in with_tokens) / len(with_tokens)
    stats["ppo/policy/last_policykl"] = updates[-1]["policy/policykl"]
    stats["ppo/updates"] = float(len(updates))
    if record.returns is None:
        return stats
    explained = 1.0 - stats["ppo/val/error"] / stats["ppo/returns/var"] if stats["ppo/returns/var"] > 0 else 0.0
    stats["ppo/val/explained_variance"] = stats["ppo/val/var_explained"] = explained
    return stats
