"""From the settings to a pipeline that scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.model_source import ModelSource
from common.notes import say
from common.records import Prompt
from common.start_files import check_start_files, start_files
from rlhf.config import RewardComponent, RewardSettings
from rlhf.reward_pipelines.combine import Ensemble, WeightedSum
from rlhf.reward_pipelines.function import PythonFunction, check_signature, load_function
from rlhf.reward_pipelines.model import TrainedEnsemble, TrainedRewardModel
from rlhf.reward_pipelines.part import Answers, RewardPart, RewardResult
from rlhf.reward_pipelines.rules import LengthRule, MustEndRule, RegexRule, RepetitionRule

if TYPE_CHECKING:
    import torch
    from torch import nn


_EXTRA_FIGURES: dict[str, dict[str, str]] = {
    "model": {"_raw": "the score before normalising", "_std": "the spread of its readouts"},
    "ensemble": {"_std": "the spread of the members"},
}
"""What some parts log beside their value, by the suffix to their name."""


class RewardPipeline:
    """Scores answers given as text. `pipeline(prompts, responses, **columns)` gives the scores alone, `score` the parts too."""

    def __init__(self, root: RewardPart) -> None:
        names = Counter(part.name for part in root.walk())
        twice = [name for name, count in names.items() if count > 1]
        assert not twice, f"parts of the same name {twice} would hide each other in the metrics"
        self.root = root

    def score(
        self,
        prompts: Sequence[Prompt | str],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> RewardResult:
        """Scores of answers to prompts (a string is a question without context), in their order.

        `columns`: every other column of each prompt's row. `ended`: False for answers cut off before EOS; default: all ended.
        Raises UserError where a user's function fails.
        """
        components: dict[str, list[float]] = {}
        answers = _answers(prompts, responses, columns, ended)
        scores = self.root.score(answers, components) if answers.responses else []
        return RewardResult(scores, components)

    def __call__(self, prompts: Sequence[Prompt | str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """Scores alone; columns as lists with one value per answer."""
        for name, values in columns.items():
            if len(values) != len(responses):
                raise ValueError(f"column {name} has {len(values)} values for {len(responses)} responses")
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(responses))]
        return self.score(prompts, responses, rows).scores

    @property
    def networks(self) -> list[nn.Module]:
        """The reward models in it."""
        scorers = [part.scorer for part in self.root.walk() if isinstance(part, TrainedRewardModel)]
        return [model for scorer in scorers if (model := getattr(scorer, "model", None)) is not None]

    @property
    def needs_calibration(self) -> bool:
        """Whether a part is normalised by reference answers that it has not seen yet."""
        return any(part.needs_calibration for part in self.root.walk())

    @property
    def texts_cut(self) -> int:
        """Prompts and answers that some reward model could not read whole, so far."""
        return sum(part.texts_cut for part in self.root.walk())

    def calibrate(
        self,
        prompts: Sequence[Prompt | str],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> None:
        """Show the reference's answers, once at the start, to the parts with `normalise: reference`.

        With several processes every one must see the same answers, or take the first one's `state_dict`.
        """
        answers = _answers(prompts, responses, columns, ended)
        for part in self.root.walk():
            part.calibrate(answers)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What `calibrate` learnt, by part; plain numbers."""
        return {part.name: state for part in self.root.walk() if (state := part.state_dict())}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take back what `state_dict` gave; raises ValueError where it is of another pipeline."""
        expected = {part.name for part in self.root.walk() if part.state_dict()}
        if expected != state.keys():
            raise ValueError(f"state of reward parts {sorted(state)}, this pipeline needs {sorted(expected)}")
        for part in self.root.walk():
            part.load_state_dict(state.get(part.name, {}))


def check_pipeline(settings: RewardSettings, *, trust_remote_code: bool = False) -> list[ModelSource]:
    """Check everything that needs no torch: reward models exist, functions can be imported, patterns compile, names differ.

    Returns what the reward models' files say about them. Raises UserError with all problems.
    """
    problems: list[str] = []
    sources: list[ModelSource] = []
    root = _component(settings)
    names = _names(root)
    for name, count in Counter(names.values()).items():
        if count > 1:
            problems.append(f"reward_config.pipeline: {count} parts are named {name}; give each its own name")
    walked = list(_walk(root, settings))
    for _, component in walked:
        for suffix, what in _EXTRA_FIGURES.get(component.type, {}).items():
            if (taken := f"{names[id(component)]}{suffix}") in names.values():
                problems.append(f"reward_config.pipeline: a part is named {taken}, as is {what} of {names[id(component)]}; rename it")
    for setting, component in walked:
        try:
            if component.type == "model":
                assert component.model_name is not None
                source = check_start_files(
                    component.model_name,
                    settings.rm_pretrain,
                    base_setting=setting,
                    setting="reward_config.rm_pretrain",
                    role="reward",
                    trust_remote_code=trust_remote_code,
                )
                sources.append(source)
                idle = component.model_fields_set & {"combine", "std_coef"}
                if idle and source.readouts == 1:
                    place = setting.removesuffix(".model_name")
                    problems.extend(f"{place}.{key}: has no effect: {component.model_name} has one readout" for key in sorted(idle))
            elif component.type == "function":
                assert component.path is not None
                load_function(component.path)
            elif component.type == "regex":
                _compiled(component, setting)
        except UserError as error:
            problems.extend(_of_function(setting, component, error))
    if problems:
        raise UserError(*problems)
    return sources


def check_columns(settings: RewardSettings, columns: Collection[str]) -> None:
    """Raise UserError for each function that asks for a column beside these, which the prompts' rows have."""
    problems: list[str] = []
    for setting, component in _walk(_component(settings), settings):
        if component.type == "function":
            assert component.path is not None
            try:
                check_signature(component.path, load_function(component.path), columns)
            except UserError as error:
                problems.extend(_of_function(setting, component, error))
    if problems:
        raise UserError(*problems)


def _of_function(setting: str, component: RewardComponent, error: UserError) -> list[str]:
    """The problems of a component, with the setting that names a function before those of one."""
    return [f"{setting}.path: {problem}" if component.type == "function" else problem for problem in error.problems]


def build_pipeline(settings: RewardSettings, *, device: torch.device | str = "cpu", trust_remote_code: bool = False) -> RewardPipeline:
    """Load what the settings name. Call `check_pipeline` before, so that what can fail fails before models are loaded."""
    root = _component(settings)
    return RewardPipeline(_build(root, _names(root), settings, device, trust_remote_code))


def as_pipeline(reward: Any, *, device: torch.device | str = "cpu") -> RewardPipeline:
    """The pipeline of what a user has: a function, its path (`module:function`), a reward model's directory, a part, or a pipeline.

    Raises UserError where there is no such function or model.
    """
    if isinstance(reward, RewardPipeline):
        return reward
    if isinstance(reward, RewardPart):
        return RewardPipeline(reward)
    if isinstance(reward, str | Path):
        path = str(reward)
        if ":" in path and not Path(path).exists():
            return RewardPipeline(PythonFunction(path.rpartition(":")[2], path, load_function(path)))
        settings = RewardSettings(reward_model_name=path)
        check_pipeline(settings)
        return build_pipeline(settings, device=device)
    if callable(reward):
        name = getattr(reward, "__name__", type(reward).__name__)
        return RewardPipeline(PythonFunction(name if name.isidentifier() else "function", name, reward))
    raise UserError(
        f"reward: got {type(reward).__name__}, expected a function, module:function, the directory of a reward model or a RewardPipeline"
    )


def _component(settings: RewardSettings) -> RewardComponent:
    return settings.pipeline or RewardComponent(type="model", model_name=settings.reward_model_name)


def _walk(root: RewardComponent, settings: RewardSettings) -> Iterator[tuple[str, RewardComponent]]:
    """Every component with the setting that a message about it names."""
    if settings.pipeline is None:
        yield "reward_config.reward_model_name", root
        return

    def walk(component: RewardComponent, place: str) -> Iterator[tuple[str, RewardComponent]]:
        yield f"{place}.model_name" if component.type == "model" else place, component
        for number, member in enumerate(component.members):
            yield from walk(member, f"{place}.members[{number}]")

    yield from walk(root, "reward_config.pipeline")


def _names(root: RewardComponent) -> dict[int, str]:
    """The name of each component, by identity: its own, else its type, numbered from the second on."""
    components: list[RewardComponent] = []

    def collect(component: RewardComponent) -> None:
        components.append(component)
        for member in component.members:
            collect(member)

    collect(root)
    taken = {component.name for component in components if component.name}
    names: dict[int, str] = {}
    for component in components:
        name, number = component.name or component.type, 1
        while not component.name and name in taken:
            number += 1
            name = f"{component.type}_{number}"
        taken.add(name)
        names[id(component)] = name
    return names


def _build(
    component: RewardComponent,
    names: Mapping[int, str],
    settings: RewardSettings,
    device: torch.device | str,
    trust_remote_code: bool,
) -> RewardPart:
    name = names[id(component)]
    members = [_build(member, names, settings, device, trust_remote_code) for member in component.members]
    match component.type:
        case "model":
            from common.models.reward import RewardScorer

            assert component.model_name is not None
            start = start_files(component.model_name, settings.rm_pretrain)
            scorer = RewardScorer(
                start.model,
                batch_size=component.batch_size or settings.batch_size,
                dtype=settings.model_dtype,
                device=device,
                offload=settings.offload,
                trust_remote_code=trust_remote_code,
                weights=start.weights,
            )
            normalise = component.normalise
            if normalise == "manifest" and not scorer.knows_its_scale:
                say(
                    f"{start.model} has no mean and scale of its scores in a manifest (a stopped run, a model from elsewhere): "
                    "normalised by the reference's answers, as with normalise: reference"
                )
                normalise = "reference"
            if scorer.model.members > 1:
                return TrainedEnsemble(name, scorer, normalise, component.combine, component.std_coef)
            return TrainedRewardModel(name, scorer, normalise)
        case "function":
            assert component.path is not None
            return PythonFunction(name, component.path, load_function(component.path), component.timeout_s)
        case "length":
            return LengthRule(name, component.min_words, component.max_words)
        case "repetition":
            return RepetitionRule(name, component.ngram)
        case "regex":
            return RegexRule(name, _compiled(component))
        case "must_end":
            return MustEndRule(name, component.endings)
        case "sum":
            return WeightedSum(name, members, [member.weight for member in component.members])
        case "ensemble":
            return Ensemble(name, members, component.combine, component.std_coef)


def _compiled(component: RewardComponent, setting: str = "reward_config.pipeline") -> re.Pattern[str]:
    assert component.pattern is not None
    try:
        return re.compile(component.pattern)
    except re.error as error:
        raise UserError(f"{setting}.pattern: got {component.pattern!r}, expected a regular expression: {error}") from None


def _answers(
    prompts: Sequence[Prompt | str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]] | None,
    ended: Sequence[bool] | None,
) -> Answers:
    return Answers(
        prompts=[Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
        responses=list(responses),
        columns=[{} for _ in responses] if columns is None else list(columns),
        ended=[True] * len(responses) if ended is None else list(ended),
    )
