"""Comparing readouts: one backbone and one cache, figures beside the rule without a model, nothing trained twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from common.config import load_config
from common.errors import UserError
from common.models.load import build_backbone, train_tokenizer
from common.models.reward import RewardModel
from common.provenance import GitState
from common.readout_settings import READS, Needs, ReadoutSettings
from common.records import PairRecord, Prompt, ScoreRecord
from common.run_lock import locked
from common.score_transform import ScoreTransform
from reward_model import compare_readouts, comparison
from reward_model.comparison_config import ComparisonConfig, label
from reward_model.comparison_report import Compared, Comparison, Measured, Rows, States, markdown, picture
from reward_model.metrics import Interval

QUICK = ("trainer.params.max_steps=2", "trainer.params.val_check_interval=1")


def compare(config: Path, *overrides: str) -> Path:
    """The directory of the comparison."""
    assert compare_readouts.main(["--config_file", str(config), *QUICK, *overrides]) == 0
    return max((config.parent / "models").glob("desc-*"))


def comparison_config(write_config: Any, kind: str = "pair", architecture: str = "gpt_neo", **sections: Any) -> Path:
    objective = {"pair": "pairs", "score": "scores"}[kind]
    params = {"freeze_backbone": True, **sections.pop("model_params", {})}
    path: Path = write_config(kind, architecture, objective=objective, **{"seeds": [1, 2], "model_params": params, **sections})
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were trained, as they are."""
    names: list[str] = []
    train = comparison.train

    def counted(config: Any, *arguments: Any) -> Path:
        names.append(f"{config.desc} {config.seed}")
        return train(config, *arguments)

    monkeypatch.setattr(comparison, "train", counted)
    return names


def test_readouts_share_a_backbone_and_a_cache_and_none_is_trained_twice(
    write_config: Any, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = comparison_config(write_config, readouts=["last_token", {"name": "weighted_layers"}])
    directory = compare(config)
    assert trained == ["last_token 1", "last_token 2", "weighted_layers 1", "weighted_layers 2"]
    out = capsys.readouterr().out
    assert out.count("note: states of 92 answers take") == 1  # 46 pairs, once for all runs, test rows too
    assert len(list((config.parent / "models" / "state_cache").iterdir())) == 1

    found = json.loads((directory / "comparison.json").read_text())
    assert found["rows"] == {"val": 6, "test": 8} and found["questions"] == {"val": 6, "test": 8} and found["seeds"] == [1, 2]
    with (directory / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["readout"], line["seed"]) for line in lines] == [(name.split()[0], name.split()[1]) for name in trained]
    for readout in found["readouts"]:
        mine = [float(line["val/loss"]) for line in lines if line["readout"] == readout["label"]]
        assert readout["monitored"] == mine
        assert len(set(mine)) == 2  # seeds differ
    heads = {readout["label"]: readout["parameters"] for readout in found["readouts"]}
    assert heads == {"last_token": 32, "weighted_layers": 32 + 2}
    best = min(found["readouts"], key=lambda readout: np.mean(readout["monitored"]))
    assert found["chosen"] == best["label"]
    latest = (directory / "runs" / "reward_classification" / "latest").resolve()
    assert latest.parents[1].name == f"desc-{best['label']},index-{1 + int(np.argmin(best['monitored']))}"
    assert RewardModel.load(latest).readout_settings.name == best["label"]
    kept = [path for path in (directory / "runs" / "reward_classification").glob("*/checkpoints") if path.is_dir()]
    assert len(kept) == 2  # the best seed of each
    assert (directory / "comparison.png").read_bytes().startswith(b"\x89PNG")

    # a killed run is done again, a new seed added, what is there stays
    del trained[:]
    runs = directory / "runs" / "reward_classification"
    (runs / "desc-last_token,index-2" / comparison.FINISHED).unlink()
    before = (runs / "desc-last_token,index-1" / comparison.FINISHED).read_text()
    assert compare(config, "--resume", "seeds=[1,2,3]") == directory
    assert trained == ["last_token 2", "last_token 3", "weighted_layers 3"]
    assert (runs / "desc-last_token,index-1" / comparison.FINISHED).read_text() == before
    again = json.loads((directory / "comparison.json").read_text())
    old, new = (next(readout for readout in one["readouts"] if readout["label"] == "last_token") for one in (found, again))
    assert new["test"]["seeds"][:2] == old["test"]["seeds"] and len(new["test"]["seeds"]) == 3
    assert again["states"][0]["seconds"] == found["states"][0]["seconds"]  # of the first filling

    with pytest.raises(UserError, match=r"compares under other settings: model_params\.\S+ .* \(it began with .*\); start a new one"):
        compare(config, "--resume", "model_params.weight_decay=0.5")


def test_ctrl_c_between_trainings_names_the_directory_that_goes_on(write_config: Any, trained: list[str], monkeypatch: Any) -> None:
    config = comparison_config(write_config, readouts=["last_token"])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(comparison, "train_and_score", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"is kept; --resume .*desc-.* goes on with it"):
            compare(config)
    compare(config, "--resume")
    assert trained == ["last_token 1", "last_token 2"]


def test_scores_a_rate_for_each_readout_and_those_that_make_no_sense(write_config: Any, trained: list[str]) -> None:
    readouts = [{"name": "decoder_output"}, {"name": "mean_pool", "hidden_sizes": [4]}]
    config = comparison_config(write_config, "score", "t5", readouts=readouts, seeds=[1], learning_rates=[1e-3, 1e-2])
    directory = compare(config, "keep_models=true")
    assert trained == [f"{name}-lr-{rate} 1" for name in ("decoder_output", "mean_pool-hidden_sizes-4") for rate in ("0.001", "0.01")]
    found = Comparison.load(json.loads((directory / "comparison.json").read_text()))
    assert found.metric.name == "MSE" and found.rows == {"val": 12, "test": 16}
    with (directory / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    for readout in found.readouts:
        losses = {float(line["learning_rate"]): float(line["val/loss"]) for line in lines if line["readout"] == readout.label}
        assert readout.learning_rate == min(losses, key=lambda rate: losses[rate])
    assert {one.kept for one in found.states} == {
        "the first token in the last layer of the decoder",
        "every token in the last layer of the encoder",
    }
    assert len(list((directory / "runs" / "reward_regression").glob("*/checkpoints"))) == 4


def test_a_backbone_that_trains_has_no_states_to_keep(write_config: Any, trained: list[str]) -> None:
    config = comparison_config(write_config, readouts=["mean_pool"])
    directory = compare(config, "model_params.freeze_backbone=false", "keep_models=true")
    found = Comparison.load(json.loads((directory / "comparison.json").read_text()))
    assert trained == ["mean_pool 1", "mean_pool 2"] and found.states == [] and not (config.parent / "models" / "state_cache").exists()
    assert found.readouts[0].parameters == found.backbone_parameters + 32
    assert found.readouts[0].test is not None and len(found.readouts[0].test.seeds) == 2
    assert len(list((directory / "runs" / "reward_classification").glob("*/checkpoints"))) == 2


SENSELESS = {"gpt_neo": {"attention_pooled_encoder", "attention_pooled_decoder", "decoder_output"}, "t5": set()}


@pytest.mark.parametrize("architecture", SENSELESS)
def test_readouts_that_make_no_sense_are_left_out_or_refused_where_they_were_asked_for(architecture: str, write_config: Any) -> None:
    path = comparison_config(write_config, "pair", architecture)
    config = load_config(ComparisonConfig, path)
    assert config.model_init is not None
    backbone = build_backbone(config.model_init, train_tokenizer(["a text"], 260), 64, 0)
    model = RewardModel.from_backbone(backbone)
    fitting, left_out = comparison.fitting_readouts(config, model)
    assert left_out.keys() == SENSELESS[architecture]
    assert {readout.name for readout in fitting} == READS.keys() - SENSELESS[architecture]
    assert set(left_out.values()) <= {"makes no sense over a causal model"}
    asked = config.model_copy(update={"readouts": [ReadoutSettings(name="mean_pool"), ReadoutSettings(name="weighted_layers", n_layers=3)]})
    with pytest.raises(UserError, match=r"^readouts\.1\.n_layers: got 3, expected at most the model's [12] layers"):
        comparison.fitting_readouts(asked, model)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["readouts=[mean_pol]"], "readouts.0: got 'mean_pol', expected a readout: "),
        (["readouts=[mean_pool,mean_pool]"], "readouts.1: stands there twice"),
        (["readouts=[{name: weighted_layers, n_layers: 3}]"], "readouts.0.n_layers: got 3, expected at most the model's 2 layers"),
        (["seeds=[]"], "seeds: "),
        (["trainer.params.devices=2"], "trainer.params.devices: expected nothing here: the runs of a comparison follow one another"),
        (["readouts=[mean_pool,decoder_output]"], "readouts.1.name: got decoder_output, which makes no sense over a causal model"),
        (["model_params.readout.name=mean_pool"], "model_params.readout: expected nothing here"),
        (["model_params.mae_loss=true"], "model_params.mae_loss: got True, expected nothing here: objective pairs has no such setting"),
        (["objective=score"], "objective: got 'score', expected pairs or scores (did you mean scores?)"),
        (["--resume"], "--resume: no comparison of desc toy in "),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(write_config: Any, overrides: list[str], expected: str) -> None:
    config = comparison_config(write_config)
    with pytest.raises(UserError) as refused:
        compare_readouts.main(["--config_file", str(config), *overrides])
    assert expected in str(refused.value)
    assert not (config.parent / "models").exists()


def test_a_comparison_that_goes_on_needs_a_clean_checkout_as_well(write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = comparison_config(write_config)
    directory = config.parent / "models" / "desc-toy,index-0"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("{}\n")
    monkeypatch.setattr("common.runs.code_state", lambda: GitState("0" * 40, ("new.py (untracked)",), "1"))
    with pytest.raises(UserError, match=r"require_clean_git: got true, but 1 file is .*: new\.py \(untracked\)"):
        compare_readouts.main(["--config_file", str(config), "--resume", "require_clean_git=true"])


def test_labels_name_what_is_no_default() -> None:
    assert label(ReadoutSettings(name="mean_pool")) == "mean_pool"
    several = ReadoutSettings(name="weighted_layers", n_layers=2, hidden_sizes=[8, 4])
    assert label(several) == "weighted_layers, n_layers 2, hidden_sizes 8-4"
    assert label(ReadoutSettings(name="last_token", ensemble=4)) == "last_token, ensemble 4"


# --- going on, and the best ------------------------------------------------------------------------------------------------------


def test_the_comparison_to_go_on_with_is_the_newest_that_of_the_index_or_the_one_named(write_config: Any, tmp_path: Path) -> None:
    path, root = comparison_config(write_config), tmp_path / "models"
    for index in (0, 1, 3):
        (root / f"desc-toy,index-{index}").mkdir(parents=True)
        (root / f"desc-toy,index-{index}" / "config.yaml").write_text("{}")

    def found(wanted: str, index: int | str = "auto") -> Path:
        return compare_readouts.earlier_directory(load_config(ComparisonConfig, path, [f"index={index}"]), root, wanted)

    assert found("auto") == root / "desc-toy,index-3"
    assert found("auto", 1) == root / "desc-toy,index-1"
    assert found(str(root / "desc-toy,index-0")) == root / "desc-toy,index-0"
    for wanted, index in (("auto", 2), (str(root), "auto")):
        with pytest.raises(UserError, match="--resume: no comparison in "):
            found(wanted, index)


def test_a_comparison_goes_on_with_more_of_the_same_alone(write_config: Any, tmp_path: Path) -> None:
    path, directory = comparison_config(write_config, readouts=["last_token"], learning_rates=[1e-3]), tmp_path / "compared"
    directory.mkdir()

    def check(*overrides: str, rows: str = "some rows") -> None:
        compare_readouts.check_the_same(load_config(ComparisonConfig, path, overrides), rows, directory)

    compare_readouts.write_config(directory, compare_readouts.resolved_dict(load_config(ComparisonConfig, path)))
    check(rows="any: none were compared yet")
    (directory / comparison.DATA_FILE).write_text("some rows\n")
    check("readouts=[last_token,mean_pool]", "seeds=[1,2,3]", "learning_rates=[1e-3,1e-2]", "keep_models=true", "bootstrap_samples=10")
    for overrides, rows, named in (
        ((), "others", f"rows of {tmp_path / 'pair.json'}"),
        (("seeds=[2,3]",), "some rows", r"seeds without 1, which it has trained \(more can be added\)"),
        (("data.batch_size=4",), "some rows", r"data\.batch_size 4 \(it began with \d+\)"),
        (
            ("seed=5", "model_params.freeze_backbone=false"),
            "some rows",
            r"model_params\.freeze_backbone False \(it began with True\), seed 5 \(it began with \d+\)",
        ),
    ):
        with pytest.raises(UserError, match=f"compares under other settings: {named}; start a new one without --resume"):
            check(*overrides, rows=rows)
    then = yaml.safe_load((directory / "config.yaml").read_text())
    del then["data"]["padding_free"]
    (directory / "config.yaml").write_text(yaml.safe_dump({**then, "oven": 1}))
    check()  # this version has other settings
    with pytest.raises(UserError, match="padding_free False"):
        check("data.padding_free=false")


def test_another_rate_is_another_training_and_a_rate_that_is_added_leaves_the_others(write_config: Any, trained: list[str]) -> None:
    config = comparison_config(write_config, readouts=["last_token"], seeds=[1], learning_rates=[1e-3])
    directory = compare(config, "bootstrap_samples=0")
    assert compare(config, "bootstrap_samples=0", "--resume", "learning_rates=[1e-2]") == directory
    assert compare(config, "bootstrap_samples=0", "--resume", "learning_rates=[1e-3,1e-2]") == directory
    assert trained == ["last_token-lr-0.001 1", "last_token-lr-0.01 1"]


def test_one_process_at_a_time_compares_in_a_directory(write_config: Any) -> None:
    config = comparison_config(write_config)
    directory = config.parent / "models" / "desc-toy,index-0"
    directory.mkdir(parents=True)
    compare_readouts.write_config(directory, compare_readouts.resolved_dict(load_config(ComparisonConfig, config, QUICK)))
    with locked(directory), pytest.raises(UserError, match="another process writes this run"):
        compare_readouts.main(["--config_file", str(config), *QUICK, "--resume"])
    assert directory.is_dir()


def test_the_best_checkpoint_scores_what_it_did_not_learn_from(write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ComparisonConfig, comparison_config(write_config))
    own = config.run(ReadoutSettings(), 1e-3, 1, backbone="any", folder=tmp_path, cache=tmp_path)
    run, loaded = comparison.Run(ReadoutSettings(), own, tmp_path / "run"), []

    class Scorer:
        def __init__(self, name: str, **_: Any) -> None:
            loaded.append(name)

        def score_inputs(self, answers: list[float]) -> list[float]:
            return [answer / 2 for answer in answers]

    def train(*_: Any) -> None:
        run.directory.mkdir()
        (run.directory / "summary.json").write_text('{"steps": 3, "best_value": 0.5}')

    monkeypatch.setattr(comparison, "RewardScorer", Scorer)
    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison, "objective_of", lambda *_: SimpleNamespace(transform=ScoreTransform(shift=1.0, scale=2.0)))
    rows = {"train": [(9.0, 9.0)], "val": [(1.0, 2.0), (3.0, 4.0)], "test": [(5.0, 6.0)]}
    answers = {split: [SimpleNamespace(answers=row) for row in found] for split, found in rows.items()}
    prepared = comparison.Prepared(Needs("whole", "last"), 0, answers)
    comparison.train_and_score(run, None, prepared, SimpleNamespace(around=lambda objective: objective))
    finished = run.finished
    assert finished is not None and loaded == [str(run.directory / "best")]
    assert finished["scores"] == {"val": [2.0, 3.0, 4.0, 5.0], "test": [6.0, 7.0]}  # x / 2 * 2 + 1
    assert (finished["steps"], finished["best_value"]) == (3, 0.5)


@pytest.mark.parametrize("kind", ["pair", "score"])
def test_the_settings_that_a_comparison_wrote_can_be_compared_again(kind: str, write_config: Any, tmp_path: Path) -> None:
    config = load_config(ComparisonConfig, comparison_config(write_config, kind))
    (tmp_path / "compared").mkdir()
    written = compare_readouts.write_config(tmp_path / "compared", compare_readouts.resolved_dict(config))
    assert load_config(ComparisonConfig, written) == config


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [("min", [0.5, 0.25, 0.75], 1), ("max", [0.5, 0.25, 0.75], 2), ("min", [None, 7.0], 1), ("max", [None, -7.0], 1)],
)
def test_the_best_run_has_the_least_or_the_most_and_not_what_was_never_finite(
    mode: str, values: list[float | None], best: int, tmp_path: Path
) -> None:
    runs = [comparison.Run(ReadoutSettings(), SimpleNamespace(desc="a"), tmp_path / str(number)) for number in range(len(values))]
    for run, value in zip(runs, values, strict=True):
        (run.directory / "checkpoints").mkdir(parents=True)
        (run.directory / "best").symlink_to("checkpoints")
        (run.directory / comparison.FINISHED).write_text(json.dumps({"best_value": value}))
    other = comparison.Run(ReadoutSettings(), SimpleNamespace(desc="b"), tmp_path / "other")
    (other.directory / "checkpoints").mkdir(parents=True)
    assert comparison.best_run(runs, mode) is runs[best]
    comparison.keep_the_best([*runs, other], runs[0], mode)
    assert [(run.directory / "best").is_symlink() for run in runs] == [run is runs[best] for run in runs]
    assert [(run.directory / "checkpoints").is_dir() for run in (*runs, other)] == [run is runs[best] for run in runs] + [True]


# --- figures ---------------------------------------------------------------------------------------------------------------------


def pair(question: str, chosen: str, *rejected: str) -> PairRecord:
    return PairRecord(Prompt(question), chosen, rejected, None, {}, "")


def test_pairs_are_counted_as_they_stand_in_the_scores() -> None:
    rows = Rows.of_pairs([pair("a", "longer", "short", "longest"), pair("b", "same", "size")])
    assert rows.groups.tolist() == [0, 0, 1]
    assert rows.baseline.tolist() == [1.0, 0.0, 0.5]
    # chosen, two rejected; chosen, rejected
    assert rows.measure([1.0, 2.0, 0.0, 3.0, 3.0]).tolist() == [0.0, 1.0, 0.5]


def test_the_gain_is_over_the_rule_and_positive_where_the_readout_is_better() -> None:
    records = [ScoreRecord(Prompt(name), "text", score, {}, "") for name, score in (("a", 0.0), ("b", 4.0))]
    rows = Rows.of_scores(records, train_mean=1.0)
    assert rows.baseline.tolist() == [1.0, 9.0]
    measured = Measured.of([rows.measure([0.0, 2.0]), rows.measure([0.0, 4.0])], rows, "scores", 200, 0)
    assert measured.seeds == [2.0, 0.0] and measured.mean == 1.0
    assert measured.gain == pytest.approx(5.0 - 1.0)
    assert measured.interval == Interval(0.0, 2.0)  # drawn again: question a, b, or both
    assert measured.gain_interval == Interval(1.0, 7.0)


def compared(label: str, tokens: str, seeds: list[float], gain: float) -> Compared:
    measured = Measured(seeds, Interval(0.25, 0.875), gain, Interval(gain - 0.25, gain + 0.25))
    return Compared(label, 1e-3, 129, [1.0, 3.0], [0.5, 0.75], tokens, measured, measured)


SHOWN = Comparison(
    objective="pairs",
    data="some_pairs",
    backbone="gpt_neo",
    backbone_parameters=1_250_000,
    monitor="val/loss",
    rows={"val": 10, "test": 20},
    questions={"val": 4, "test": 7},
    baseline={"val": 0.5, "test": 0.625},
    seeds=[1, 2],
    unit="core seconds",
    states=[States("every token in 4 layers", ["mean_pool"], 3 * 2**20, 12.5)],
    readouts=[compared("last_token", "one", [0.5, 0.75], 0.0), compared("mean_pool", "all", [0.75, 0.75], 0.125)],
    chosen="mean_pool",
    left_out={"decoder_output": "makes no sense over a causal model"},
)


def test_the_table_has_the_rule_first_and_the_readout_that_validation_chose_in_bold() -> None:
    lines = markdown(SHOWN).splitlines()
    assert lines[0].startswith("| readout | test accuracy (of the seeds) | validation accuracy (of the seeds) | 95 % by question |")
    assert lines[2].startswith("| *the longer answer wins* | 0.625 | 0.500 |")
    assert lines[3] == (
        "| last_token | 0.625 (0.500 to 0.750) | 0.625 (0.500 to 0.750) | [0.250, 0.875] | +0.000 [-0.250, 0.250] | 0.001 | 129 | 2.0 |"
    )
    assert lines[4].startswith("| **mean_pool** | 0.750 (0.750 to 0.750) |") and "+0.125 [-0.125, 0.375]" in lines[4]
    assert {len(line.split("|")) for line in lines[:5]} == {10}
    text = markdown(SHOWN)
    assert "pairs: 10 of 4 questions in val; 20 of 7 questions in test." in text
    assert "mean_pool: every token in 4 layers, 3.0 MiB, 12.5 core seconds" in text
    assert "Left out: decoder_output (makes no sense over a causal model)." in text


def test_figures_survive_their_file() -> None:
    assert Comparison.load(json.loads(SHOWN.json())) == SHOWN


def test_the_picture_shows_seeds_means_intervals_and_the_rule() -> None:
    panel, costs = picture([[SHOWN]]).axes
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["last_token", "mean_pool"]  # the better one above
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
    for place, readout in enumerate(SHOWN.readouts):
        assert (list(readout.val.interval), [place, place]) in drawn
        assert (readout.val.seeds, [place, place]) in drawn
        assert ([readout.val.mean], [place]) in drawn
    assert ([0.625, 0.625], [0, 1]) in drawn  # the rule
    assert panel.get_xlim()[0] < panel.get_xlim()[1]
    texts = [text.get_text() for text in (*panel.texts, *costs.texts)]
    assert "test: 20 pairs of 7 questions" in texts and "2.0 s, 129 weights" in texts
    errors = Comparison(**{**SHOWN.__dict__, "objective": "scores"})
    left, right = picture([[errors]]).axes[0].get_xlim()
    assert left > right  # less error is to the right
