"""A trained reward model as part of a reward."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from common.records import Prompt
from common.score_transform import LEAST_SCALE
from rlhf.reward_pipelines.combine import combined
from rlhf.reward_pipelines.part import Answers, RewardPart
from rlhf.setting_rules import Combine, Normalise


class Scorer(Protocol):
    """What `common.models.reward.RewardScorer` offers: final scores of texts, with mean and scale on the training set."""

    @property
    def score_mean(self) -> float: ...
    @property
    def score_scale(self) -> float: ...
    @property
    def encoder(self) -> Any: ...
    def score(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]: ...


class MemberScorer(Scorer, Protocol):
    """What it offers beside that for an ensemble of readouts: the final scores of its members."""

    def judge(
        self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None
    ) -> Sequence[MemberScores]: ...


class MemberScores(Protocol):
    """The final score of an answer, and its members'."""

    @property
    def score(self) -> float: ...
    @property
    def members(self) -> Sequence[float]: ...


class TrainedRewardModel(RewardPart):
    """(score - mean) / scale of a reward model, whatever its tokenizer; the score itself is logged as `NAME_raw`.

    normalise: `manifest` takes mean and scale from the reward model's training set, `reference` from the answers that `calibrate`
    sees, `none` takes 0 and 1.
    """

    def __init__(self, name: str, scorer: Scorer, normalise: Normalise = "manifest") -> None:
        super().__init__(name)
        self.scorer = scorer
        self.normalise = normalise
        self._mean: float | None = None
        self._scale: float | None = None
        if normalise == "manifest":
            self._mean, self._scale = scorer.score_mean, scorer.score_scale
        elif normalise == "none":
            self._mean, self._scale = 0.0, 1.0

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        mean, scale = self.mean, self.scale
        raw = self._raw(answers)
        if self.normalise != "none":
            components[f"{self.name}_raw"] = raw
        return [(score - mean) / scale for score in raw]

    @property
    def mean(self) -> float:
        """What is subtracted from scores. Raises ValueError before a calibration that is needed."""
        return self._known(self._mean)

    @property
    def scale(self) -> float:
        """What scores are divided by. Raises ValueError before a calibration that is needed."""
        return self._known(self._scale)

    def _known(self, number: float | None) -> float:
        if number is None:
            raise ValueError(f"reward {self.name} is normalised by reference answers: calibrate the pipeline before it scores")
        return number

    @property
    def texts_cut(self) -> int:
        counts = self.scorer.encoder.counts
        return int(counts["prompts cut"] + counts["answers cut"])

    def _raw(self, answers: Answers) -> list[float]:
        return self.scorer.score(answers.prompts, answers.responses, answers.ended)

    @property
    def needs_calibration(self) -> bool:
        return self._mean is None

    def calibrate(self, answers: Answers) -> None:
        if self.normalise != "reference":
            return
        self._learn_scale(self._raw(answers))

    def _learn_scale(self, raw: Sequence[float]) -> None:
        self._mean = statistics.fmean(raw)
        spread = statistics.pstdev(raw)
        self._scale = spread if spread > LEAST_SCALE else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "scale": self._scale} if self.normalise == "reference" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.normalise == "reference":
            self._mean, self._scale = state["mean"], state["scale"]


class TrainedEnsemble(TrainedRewardModel):
    """A reward model with several readouts: what `combined` makes of (score - mean) / scale of each, their spread logged as `NAME_std`.

    The scale is the model's own; the mean is each member's, since a readout trained on pairs has a zero of its own.
    """

    scorer: MemberScorer

    def __init__(
        self,
        name: str,
        scorer: MemberScorer,
        normalise: Normalise = "manifest",
        how: Combine = "mean",
        std_coef: float = 1.0,
    ) -> None:
        super().__init__(name, scorer, normalise)
        self.how = how
        self.std_coef = std_coef
        self._member_means: list[float] | None = None  # None: all as the model's, to which the scorer shifts its members

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        mean, scale = self.mean, self.scale
        judged = self.scorer.judge(answers.prompts, answers.responses, answers.ended)
        means = [mean] * len(judged[0].members) if self._member_means is None else self._member_means
        rows = [[(score - own) / scale for score, own in zip(answer.members, means, strict=True)] for answer in judged]
        if self.normalise != "none":
            components[f"{self.name}_raw"] = [answer.score for answer in judged]
        values, components[f"{self.name}_std"] = combined(rows, self.how, self.std_coef)
        return values

    def calibrate(self, answers: Answers) -> None:
        if self.normalise != "reference":
            return
        judged = self.scorer.judge(answers.prompts, answers.responses, answers.ended)
        self._learn_scale([answer.score for answer in judged])
        self._member_means = [statistics.fmean(scores) for scores in zip(*(answer.members for answer in judged), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"member_means": self._member_means} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._member_means = state.get("member_means")
