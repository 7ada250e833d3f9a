"""Rewards by hand: every part, their sums and ensembles, users' functions and all they can do wrong."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPTNeoConfig, GPTNeoForSequenceClassification

from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.models.load import build_backbone, train_tokenizer
from common.models.reward import Judgement, RewardModel, RewardScorer
from common.readout_settings import ReadoutSettings
from common.records import Prompt
from common.schema import ModelInit
from examples.custom_reward import polite_and_short
from rlhf.config import RewardSettings
from rlhf.ppo.models import Critic
from rlhf.reward_pipelines import RewardPipeline, build_pipeline, check_pipeline
from rlhf.reward_pipelines.combine import Ensemble, WeightedSum
from rlhf.reward_pipelines.model import TrainedEnsemble, TrainedRewardModel
from rlhf.reward_pipelines.rules import repeated_share


class TableScorer:
    """A reward model whose scores are read from a table of answers."""

    def __init__(self, scores: dict[str, float], mean: float = 0.0, scale: float = 1.0) -> None:
        self.scores, self.score_mean, self.score_scale = scores, mean, scale
        self.seen: list[tuple[Any, ...]] = []

    def score(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]:
        self.seen.append((list(prompts), list(responses), list(ended or [])))
        return [self.scores[response] for response in responses]


def settings(**pipeline: Any) -> RewardSettings:
    return RewardSettings.model_validate({"pipeline": pipeline})


def scores_of(responses: list[str], **pipeline: Any) -> list[float]:
    return build_pipeline(settings(**pipeline))(["q"] * len(responses), responses)


# --- rules -------------------------------------------------------------------------------------------------------------------------


def test_length_costs_one_per_word_outside_the_bounds() -> None:
    answers = ["", "one", "one two, three!", "one two three four five", "北京是首"]
    assert scores_of(answers, type="length", min_words=2, max_words=3) == [-2, -1, 0, -2, -1]
    assert scores_of(answers, type="length", max_words=3) == [0, 0, 0, -2, -1]


def test_repetition_is_the_share_of_ngrams_that_stood_before() -> None:
    # "a b a b a": bigrams ab ba ab ba, two of four are repeats
    assert repeated_share(["a", "b", "a", "b", "a"], 2) == 0.5
    assert repeated_share(["a", "b", "c"], 2) == 0
    assert repeated_share(["a"], 2) == 0
    assert scores_of(["A b. a b? A!", ""], type="repetition", ngram=2) == [-0.5, 0]


def test_regex_and_must_end() -> None:
    assert scores_of(["It is 42.", "none"], type="regex", pattern=r"\d+") == [1, 0]
    assert scores_of(["Yes. ", "Yes", "Yes!\n", ""], type="must_end") == [1, 0, 1, 0]
    assert scores_of(["Yes.", "是。"], type="must_end", endings=["。"]) == [0, 1]


# --- combinations ------------------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_logs_every_part() -> None:
    pipeline = build_pipeline(
        settings(
            type="sum",
            name="total",
            members=[
                {"type": "regex", "pattern": "yes", "weight": 2.0},
                {"type": "regex", "pattern": "no", "weight": -0.5, "name": "refusal"},
                {"type": "regex", "pattern": "maybe"},
            ],
        ),
    )
    result = pipeline.score(["q"] * 3, ["yes", "no yes", "maybe no"])
    assert result.scores == [2, 1.5, 0.5]
    assert result.components == {"regex": [1, 1, 0], "refusal": [0, 1, 1], "regex_2": [0, 0, 1], "total": [2, 1.5, 0.5]}


@pytest.mark.parametrize(("how", "expected"), [("mean", [2.0, 0.0]), ("min", [1.0, -2.0]), ("mean_minus_std", [1.5, -1.0])])
def test_ensembles_by_hand(how: Any, expected: list[float]) -> None:
    # normalised: (12 - 10) / 2 = 1 and 3; (6 - 10) / 2 = -2 and 2. Means 2 and 0, spreads 1 and 2.
    first = TrainedRewardModel("first", TableScorer({"a": 12, "b": 6}, mean=10, scale=2))
    second = TrainedRewardModel("second", TableScorer({"a": 3, "b": 2}))
    pipeline = RewardPipeline(Ensemble("both", [first, second], how, std_coef=0.5))
    result = pipeline.score(["q", "q"], ["a", "b"])
    assert result.scores == expected
    assert result.components["first_raw"] == [12, 6]
    assert result.components["first"] == [1, -2]
    assert result.components["both_std"] == [1, 2]


def test_nested_sums() -> None:
    inner = {"type": "sum", "weight": 3.0, "members": [{"type": "regex", "pattern": "a"}, {"type": "regex", "pattern": "b", "weight": 2.0}]}
    pipeline = build_pipeline(settings(type="sum", members=[inner, {"type": "must_end"}]))
    result = pipeline.score(["q"], ["ab."])
    assert result.scores == [10]
    assert set(result.components) == {"sum", "sum_2", "regex", "regex_2", "must_end"}


# --- trained models ----------------------------------------------------------------------------------------------------------------


def test_reference_answers_give_mean_and_scale_which_a_checkpoint_keeps() -> None:
    def pipeline() -> RewardPipeline:
        scorer = TableScorer({"x": 1, "y": 5, "z": 7})
        return RewardPipeline(WeightedSum("sum", [TrainedRewardModel("model", scorer, "reference")], [1.0]))

    first = pipeline()
    assert first.needs_calibration
    with pytest.raises(ValueError, match="calibrate"):
        first(["q"], ["z"])
    first.calibrate(["q", "q"], ["x", "y"])  # mean 3, spread 2
    assert not first.needs_calibration
    assert first(["q"], ["z"]) == [2]
    second = pipeline()
    second.load_state_dict(first.state_dict())
    assert second(["q"], ["z"]) == [2]
    assert first.state_dict() == {"model": {"mean": 3, "scale": 2}}
    with pytest.raises(ValueError, match="this pipeline needs"):
        second.load_state_dict({})


def test_reference_answers_that_score_alike_are_not_divided_by_nothing() -> None:
    pipeline = RewardPipeline(TrainedRewardModel("model", TableScorer({"x": 4, "almost x": 4 + 1e-7, "y": 5}), "reference"))
    for other in ("x", "almost x"):
        pipeline.calibrate(["q", "q"], ["x", other])
        assert pipeline(["q"], ["y"]) == pytest.approx([1])


def test_prompts_with_context_and_cut_answers_reach_the_model_as_they_are() -> None:
    scorer = TableScorer({"a": 1, "b": 2})
    prompt = Prompt("q", context="c", history=(("q0", "a0"),))
    RewardPipeline(TrainedRewardModel("model", scorer)).score([prompt, "plain"], ["a", "b"], ended=[True, False])
    assert scorer.seen == [([prompt, Prompt("plain")], ["a", "b"], [True, False])]


class EnsembleScorer(TableScorer):
    """As `TableScorer`; the table has the scores of every member."""

    def __init__(self, members: dict[str, list[float]], mean: float = 0.0, scale: float = 1.0) -> None:
        super().__init__({response: statistics.fmean(values) for response, values in members.items()}, mean, scale)
        self.members = members

    def judge(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[Judgement]:
        return [Judgement(score, self.members[one]) for score, one in zip(self.score(prompts, responses, ended), responses, strict=True)]


@pytest.mark.parametrize(("how", "expected"), [("mean", [2.0, 0.0]), ("min", [1.0, -2.0]), ("mean_minus_std", [1.5, -1.0])])
def test_the_readouts_of_a_model_are_combined_as_models_are(how: Any, expected: list[float]) -> None:
    # (12 - 10) / 2 = 1 and (16 - 10) / 2 = 3; -2 and 2. Means 2 and 0, spreads 1 and 2.
    scorer = EnsembleScorer({"a": [12, 16], "b": [6, 14]}, mean=10, scale=2)
    result = RewardPipeline(TrainedEnsemble("model", scorer, how=how, std_coef=0.5)).score(["q", "q"], ["a", "b"])
    assert result.scores == result.components["model"] == expected
    assert result.components["model_raw"] == [14, 10]
    assert result.components["model_std"] == [1, 2]
    assert len(scorer.seen) == 1  # one pass through the model
    plain = RewardPipeline(TrainedEnsemble("model", scorer, "none", how=how, std_coef=0.5)).score(["q"], ["a"])
    assert plain.components.keys() == {"model", "model_std"} and plain.components["model_std"] == [2]


def test_reference_answers_give_every_member_its_own_zero() -> None:
    """Members that agree but for 100 points do not disagree."""

    def pipeline() -> RewardPipeline:
        scorer = EnsembleScorer({"x": [1, 101], "y": [5, 105], "z": [7, 109]})
        return RewardPipeline(TrainedEnsemble("model", scorer, "reference", "mean_minus_std"))

    first = pipeline()
    assert first.needs_calibration
    first.calibrate(["q", "q"], ["x", "y"])  # means 3 and 103, of the model 53; scale 2
    result = first.score(["q", "q"], ["y", "z"])
    assert result.components["model_std"] == [0, 0.5]
    assert result.scores == [1, 2.5 - 0.5]
    second = pipeline()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.score(["q", "q"], ["y", "z"]) == result


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny plain transformers reward model."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = train_tokenizer(["Question: what is the capital of France?\nAnswer: Paris."], 300)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_alone_and_inside_a_sum(reward_dir: Path) -> None:
    alone = RewardSettings(reward_model_name=str(reward_dir))
    (source,) = check_pipeline(alone)
    assert source.is_reward_model
    prompts, responses = ["What is the capital of France?", "Why?"], ["Paris.", "Because."]
    pipeline = build_pipeline(alone)
    pipeline.calibrate(prompts, responses)
    result = pipeline.score(prompts, responses)
    assert result.components.keys() == {"model", "model_raw"}
    assert result.scores[0] != result.scores[1]
    member = {"type": "model", "model_name": str(reward_dir), "weight": 2.0, "normalise": "none"}
    both = settings(type="sum", members=[member, {"type": "must_end"}])
    assert build_pipeline(both)(prompts, responses) == pytest.approx([2 * score + 1 for score in result.components["model_raw"]])


def test_a_model_that_does_not_know_its_scale_is_normalised_by_reference_answers(
    reward_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = build_pipeline(RewardSettings(reward_model_name=str(reward_dir)))
    assert "has no mean and scale of its scores in a manifest" in capsys.readouterr().out
    assert pipeline.needs_calibration
    pipeline.calibrate(["a", "b", "c"], ["Paris.", "Because.", "So."])
    scores = pipeline(["a", "b", "c"], ["Paris.", "Because.", "So."])
    assert sum(scores) == pytest.approx(0, abs=1e-5) and sum(score**2 for score in scores) == pytest.approx(3, rel=1e-4)


def test_an_ensemble_from_its_directory(tmp_path: Path) -> None:
    """The members' spread lowers the reward, and a value head starts from the mean of their weights."""
    tokenizer = train_tokenizer(["Question: what is the capital of France?\nAnswer: Paris."], 300)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    backbone = build_backbone(ModelInit(model_type="gpt_neo", config=sizes), tokenizer, 64, 0)
    model = RewardModel.from_backbone(backbone, ReadoutSettings(ensemble=3), seed=0)
    manifest = new_manifest(
        "reward_classification", tokenizer, max_length=64, score_mean=0.5, score_scale=2.0, member_means=[0.1, 0.5, 0.9]
    )
    folder = save_model_directory(tmp_path / "model", model, tokenizer, manifest)
    chosen = settings(type="model", model_name=str(folder), combine="mean_minus_std", std_coef=3.0)
    check_pipeline(chosen)
    prompts, responses = ["What is the capital of France?", "Why?"], ["Paris.", "Because."]
    pipeline = build_pipeline(chosen)
    assert not pipeline.needs_calibration
    result = pipeline.score(prompts, responses)
    judged = RewardScorer(folder).judge(prompts, responses)
    assert result.components["model_std"] == pytest.approx([answer.spread / 2 for answer in judged])
    assert result.scores == pytest.approx([(answer.score - 0.5) / 2 - 3 * answer.spread / 2 for answer in judged], abs=1e-6)
    alone = build_pipeline(RewardSettings(reward_model_name=str(folder))).score(prompts, responses)
    assert alone.scores == pytest.approx([(answer.score - 0.5) / 2 for answer in judged], abs=1e-6)
    assert alone.components.keys() == {"model", "model_raw", "model_std"}

    scorer = RewardScorer(folder)
    critic = Critic.from_reward_model(scorer.model, mean=0.5, scale=2.0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        value = critic.v_head(critic.trunk(ids).last_hidden_state)[0, -1]
        torch.testing.assert_close(value, (scorer.model(ids, torch.ones_like(ids))[0] - 0.5) / 2)


@pytest.mark.parametrize("setting", [{"combine": "min"}, {"std_coef": 2.0}])
def test_one_readout_has_nothing_to_combine(setting: dict[str, Any], reward_dir: Path) -> None:
    [key] = setting
    member = {"type": "model", "model_name": str(reward_dir), **setting}
    with pytest.raises(UserError, match=rf"^reward_config\.pipeline\.members\[0\]\.{key}: has no effect: .* has one readout$"):
        check_pipeline(settings(type="sum", members=[member]))


def test_no_answers_give_no_scores() -> None:
    assert scores_of([], type="must_end") == []


# --- functions ---------------------------------------------------------------------------------------------------------------------


def written(folder: Path, body: str, name: str = "mine.py") -> str:
    (folder / name).write_text(textwrap.dedent(body))
    return f"{folder / name}:reward"


def called(folder: Path, body: str, columns: list[dict[str, Any]] | None = None, **part: Any) -> list[float]:
    pipeline = build_pipeline(settings(type="function", path=written(folder, body), **part))
    prompts = [Prompt("why?", context="ctx"), Prompt("how?")]
    return pipeline.score(prompts, ["because", "so"], columns, [True, False]).scores


def test_the_example_in_ten_lines() -> None:
    scores = polite_and_short(["q"] * 3, ["Glad to help you here.", "No.", "No."], ended=[True, True, False])
    assert scores == pytest.approx([1 + 1 - 5 / 50, 1 - 1 / 50, -1 / 50])


def test_the_example_works_as_the_readme_names_it(root: Path) -> None:
    for path in ("../examples/custom_reward.py:polite_and_short", "examples.custom_reward:polite_and_short"):
        raw = {"pipeline": {"type": "function", "path": path}}
        chosen = RewardSettings.model_validate(raw, context={"base_dir": root / "rlhf"})
        assert check_pipeline(chosen) == []
        assert build_pipeline(chosen)(["q"], ["Thank you."]) == pytest.approx([1.96])


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("responses", "len(responses[i])"),
        ("prompts, completions", "len(prompts[i]) + len(completions[i])"),
        ("completions, **kwargs", "len(completions[i]) + len(kwargs['prompts'][i]) + kwargs['votes'][i] - ('responses' in kwargs)"),
        ("**kwargs", "len(kwargs['responses'][i]) + len(kwargs['completions'][i])"),
        ("prompts, responses, votes, missing=3", "votes[i] + missing"),
        ("*, responses, contexts, ended", "len(contexts[i]) + 10 * ended[i]"),
    ],
)
def test_a_function_gets_what_its_signature_asks_for(tmp_path: Path, signature: str, expected: str) -> None:
    body = f"def reward({signature}):\n    return [{expected} for i in range(2)]\n"
    votes = [{"votes": 7}, {"votes": 5}]
    values = {"prompts": ["why?", "how?"], "responses": ["because", "so"], "votes": [7, 5], "contexts": ["ctx", ""], "ended": [True, False]}
    values["completions"] = values["responses"]
    kwargs = dict(values) if signature == "**kwargs" else {k: v for k, v in values.items() if k != "responses"}
    environments = [{**values, "kwargs": kwargs, "missing": 3, "i": i} for i in range(2)]
    assert called(tmp_path, body, votes) == [eval(expected, {}, environment) for environment in environments]


@pytest.mark.parametrize("result", ["numpy.array([1, 2])", "torch.tensor([1.0, 2.0])", "(True, 2)", "[numpy.float32(1), torch.tensor(2)]"])
def test_results_of_any_numeric_kind(tmp_path: Path, result: str) -> None:
    assert called(tmp_path, f"import numpy, torch\ndef reward(responses):\n    return {result}\n") == [1.0, 2.0]


def test_columns_that_some_rows_lack_are_none(tmp_path: Path) -> None:
    body = "def reward(responses, topic):\n    return [0.0 if t is None else len(t) for t in topic]\n"
    assert called(tmp_path, body, [{"topic": "law"}, {}]) == [3, 0]


def test_the_callable_form_takes_columns_as_lists(tmp_path: Path) -> None:
    path = written(tmp_path, "def reward(responses, votes):\n    return votes\n")
    pipeline = build_pipeline(settings(type="function", path=path))
    assert pipeline(["a", "b"], ["x", "y"], votes=[3, 4]) == [3, 4]
    with pytest.raises(ValueError, match="column votes has 1 values for 2"):
        pipeline(["a", "b"], ["x", "y"], votes=[3])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def reward(responses):\n    return [1.0]\n", r"mine.py:reward returned 1 numbers for 2 answers"),
        ("def reward(responses):\n    return 1.0\n", r"returned float, expected a list of 2 numbers"),
        ("def reward(responses):\n    return '12'\n", r"returned str, expected a list"),
        ("def reward(responses):\n    return [1.0, None]\n", r"returned None, expected a finite number, for answer 1 \(to 'how\?'\)"),
        ("def reward(responses):\n    return [float('nan'), 1]\n", r"returned nan, .* for answer 0 \(to 'why\?'\)"),
        ("def reward(responses):\n    return ['1', 1]\n", r"returned '1', expected"),
        ("def reward(responses):\n    return [1, 1 / 0]\n", r"failed on 2 answers: ZeroDivisionError: division by zero \(mine.py:2\)"),
        ("def reward(texts):\n    return [1, 1]\n", r"asks for texts, there are prompts, contexts, ended, responses, completions"),
        ("def reward(responses, /):\n    return [1, 1]\n", r"asks for responses"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        called(tmp_path, body)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_a_call_that_hangs_is_given_up(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"took longer than timeout_s 0\.1 for 2 answers"):
        called(tmp_path, "import time\ndef reward(responses):\n    time.sleep(5)\n", timeout_s=0.1)
    assert time.monotonic() - started < 3
    assert called(tmp_path, "def reward(responses):\n    return [1, 2]\n", timeout_s=5.0) == [1, 2]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Also one that was changed at once and has its old size, which cached bytecode would take for the old one."""
    assert called(tmp_path, "def reward(responses):\n    return [1, 2]\n") == [1, 2]
    times = (tmp_path / "mine.py").stat()
    written(tmp_path, "def reward(responses):\n    return [3, 4]\n")
    os.utime(tmp_path / "mine.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert build_pipeline(settings(type="function", path=f"{tmp_path / 'mine.py'}:reward"))(["q", "q"], ["a", "b"]) == [3, 4]


# --- checks before anything is loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "suffix", "what"),
    [
        ("model", "_raw", "the score before normalising"),
        ("model", "_std", "the spread of its readouts"),
        ("ensemble", "_std", "the spread of the members"),
    ],
)
def test_a_name_that_another_part_logs_beside_its_value_is_refused(kind: str, suffix: str, what: str, reward_dir: Path) -> None:
    judge = {"type": "model", "name": "judge", "model_name": str(reward_dir)}
    part = judge if kind == "model" else {"type": "ensemble", "name": "judge", "members": [{"type": "repetition"}]}
    rule = {"type": "length", "max_words": 3}
    assert check_pipeline(settings(type="sum", members=[part, {**rule, "name": "judge_other"}])) is not None
    with pytest.raises(UserError, match=f"a part is named judge{suffix}, as is {what} of judge; rename it"):
        check_pipeline(settings(type="sum", members=[part, {**rule, "name": f"judge{suffix}"}]))


def test_all_problems_of_a_pipeline_are_found_at_once(tmp_path: Path) -> None:
    wrong_name = written(tmp_path, "def rewrd(responses):\n    return []\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    parts = [
        {"type": "model", "model_name": str(tmp_path / "nowhere")},
        {"type": "function", "path": wrong_name},
        {"type": "function", "path": f"{tmp_path}/broken.py:f"},
        {"type": "function", "path": f"{tmp_path}/absent.py:f"},
        {"type": "function", "path": "no.such.module:f"},
        {"type": "regex", "pattern": "("},
        {"type": "must_end", "name": "same"},
        {"type": "must_end", "name": "same"},
    ]
    with pytest.raises(UserError) as caught:
        check_pipeline(settings(type="sum", members=parts))
    text = "\n".join(caught.value.problems)
    for expected in (
        "reward_config.pipeline.members[0].model_name",
        "mine.py:reward: no function reward, there is rewrd",
        "broken.py:f: cannot be imported: SyntaxError",
        "absent.py:f: no such file",
        "no module no.such.module (for a file write its path: module.py:…)",
        "got '(', expected a regular expression",
        "2 parts are named same",
    ):
        assert expected in text
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"type": "regex", "pattern": "a", "ngram": 2}, "does not read ngram"),
        ({"type": "ensemble", "members": [{"type": "must_end", "weight": 2.0}]}, "weight of must_end has no effect in an ensemble"),
        ({"type": "must_end", "weight": 2.0}, "weight has no effect on the whole pipeline"),
        ({"type": "length"}, "needs min_words or max_words"),
    ],
)
def test_settings_without_effect_are_refused(pipeline: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**pipeline)


def test_checking_imports_no_torch(root: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "def reward(responses):\n    return []\n")
    code = f"""
import sys
from rlhf.config import RewardSettings
from rlhf.reward_pipelines import check_pipeline
check_pipeline(RewardSettings.model_validate({{"pipeline": {{"type": "function", "path": {path!r}}}}}))
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
