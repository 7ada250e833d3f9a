"""What one PPO step computed before its update, for statistics, tests and curious eyes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.ppo.answers import Answers


@dataclass(frozen=True)
class StepRecord:
    """Per-token tensors (B, T) of one step, 0 outside the answers; all before the update."""

    answers: Answers
    scores: Tensor
    """(B,) after scaling, centring and clipping."""
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    """None where the estimator reads no values."""
    kl: Tensor
    """KL to the reference per token, by the configured estimator."""
    rewards: Tensor
    non_score_rewards: Tensor
    advantages: Tensor
    """What weighs each token in the policy's loss; whitened over the batch where the estimator does so."""
    returns: Tensor | None
    """What values are trained towards; None where none is."""

    @property
    def mask(self) -> Tensor:
        """(B, T) True on tokens that count."""
        return self.answers.mask

    def classic_layout(self) -> dict[str, Tensor]:
        """The tensors as the classic trainer laid them out: (B, S - 1), entry t about predicting token t + 1 of prompt + answer."""
        answers = self.answers
        width = answers.ids.shape[1] - 1
        rows, tokens = answers.present.nonzero(as_tuple=True)
        columns = answers.starts[rows] + tokens
        laid: dict[str, Tensor] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if isinstance(tensor, Tensor) and tensor.ndim == 2:
                laid[field.name] = torch.zeros(len(answers), width).index_put_((rows, columns), tensor[rows, tokens].float())
        laid["mask"] = torch.zeros(len(answers), width).index_put_((rows, columns), answers.mask[rows, tokens].float())
        return laid
