"""From one score per answer to one reward per token.

A *score* is the reward model's number for a whole answer; a *reward* belongs to a token. Shapes: B answers, T answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningMoments:
    """Mean and standard deviation of all scores seen so far, batches joined by Chan's parallel formula.

    As in the classic trainer: the count starts at 1e-24, so that the first batch decides alone, and `std` is unbiased.
    """

    mean: float = 0.0
    var: float = 1.0
    std: float = 1.0
    count: float = 1e-24

    def update(self, scores: Tensor) -> None:
        """Take in a batch of scores (B,)."""
        scores = scores.double()
        count = float(scores.numel())
        mean = float(scores.sum()) / count
        var = float((scores - mean).square().sum()) / count
        delta = mean - self.mean
        total = self.count + count
        summed = var * count + self.var * self.count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var = summed / total
        self.std = (self.var * total / (total - 1.0)) ** 0.5 if total > 1 else 0.0
        self.count = total


LEAST_STD = 1e-6


def transform_scores(scores: Tensor, moments: RunningMoments, *, scale: bool, centre: bool, clip: float | None) -> Tensor:
    """Scores (B,) after scaling by the running standard deviation, centring by the running mean and clipping to +-`clip`.

    `moments` are updated where `scale` is on; `centre` works only with `scale`, as in the classic trainer.
    """
    if scale:
        moments.update(scores)
        # Scores that are all alike have no spread to divide by.
        deviation = moments.std + torch.finfo(scores.dtype).eps if moments.std > LEAST_STD else 1.0
        scores = (scores - moments.mean) / deviation if centre else scores / deviation
    return scores if clip is None else scores.clamp(-clip, clip)


def penalised_scores(
    scores: Tensor,
    lengths: Tensor,
    ended: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    length_penalty: float = 0.0,
) -> Tensor:
    """Scores (B,) less `length_penalty` per answer token; answers that did not end lose the penalty or get the fixed score.

    `lengths` (B,): answer tokens; `ended` (B,): True where EOS or a stop string ended the answer. A fixed score is what such an
    answer gets whatever its length.
    """
    scores = scores - length_penalty * lengths
    if missing_eos_score is not None:
        return torch.where(ended, scores, torch.full_like(scores, missing_eos_score))
    if missing_eos_penalty is not None:
        return torch.where(ended, scores, scores - missing_eos_penalty)
    return scores


def kl_shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Rewards (B, T) = -kl_coef * kl, plus the score once, at the answer's last counting token; and the part without the score.

    `kl` (B, T) per token in nats, `mask` (B, T), `scores` (B,). Outside the mask both are 0: the score of an answer without any
    token lands nowhere.
    """
    non_score = torch.where(mask, -kl_coef * kl, 0.0)
    # argmax gives the first largest: counted from the right, the last True; an empty row has none.
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    landing = torch.zeros_like(mask).scatter_(1, last[:, None], True) & mask
    return torch.where(landing, non_score + scores[:, None], non_score), non_score
