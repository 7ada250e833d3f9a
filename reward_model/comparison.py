"""The trainings of a comparison of readouts, each an ordinary run of a reward model, over one backbone and one cache of its states.

    COMPARISON/config.yaml, log.txt                       the settings, what was printed
    COMPARISON/runs/STAGE/desc-READOUT,index-SEED         the run of a readout and a seed, as train_reward.py makes it
    COMPARISON/runs/STAGE/latest                          the best seed of the readout that validates best
    COMPARISON/comparison.{md,csv,json,png}               table, a line for each run, figures, picture

A run that is trained and scored stays; one that was cut short is done again.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common.checkpoint import atomic_directory
from common.closing import BEST
from common.errors import UserError
from common.file_records import tokenizer_rows
from common.launch.checkpointing import LAST
from common.launch.lightning import training_device
from common.models.answers import CachedAnswer, StartedAnswer
from common.models.backbone import readout_needs
from common.models.kinds import backbone_kind
from common.models.reward import RewardModel, RewardScorer
from common.notes import say
from common.readout_settings import KIND_WORDS, READS, Needs, ReadoutSettings
from common.records import Splits
from common.runs import CHECKPOINTS_FOLDER, SUMMARY_FILE, publish_latest, run_name, stage_runs_root, write_text_atomically
from common.schema import resolve_monitor
from common.score_transform import ScoreTransform
from common.token_rows import token_cache
from reward_model.classification.objective import pair_objective
from reward_model.comparison_config import ComparisonConfig, label
from reward_model.comparison_report import Compared, Comparison, Measured, Rows, States, draw, markdown, table_csv
from reward_model.config import ClassificationConfig, RegressionConfig, RewardConfig
from reward_model.regression.objective import score_objective
from reward_model.training import Objective, prepare_model, read_from_cache, start_model, text_encoder, train

FINISHED = "compared.json"
"""In a run's directory once it is trained and scored."""
BACKBONE = "backbone"
"""Folder of a backbone that is built from model_init."""
STATES_SECONDS = "states.json"
DATA_FILE = "data_fingerprint.txt"
Splitted = Splits[Any]


@dataclass(frozen=True)
class Run:
    """One training."""

    readout: ReadoutSettings
    config: ClassificationConfig | RegressionConfig
    directory: Path

    @property
    def finished(self) -> dict[str, Any] | None:
        """The scores of its best checkpoint by split, `seconds` of training, `best_value` of the monitored metric; None: not done yet."""
        path = self.directory / FINISHED
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return found


@dataclass(frozen=True)
class Prepared:
    """What the trainings of a readout share: parameters that train, and the rows of each split, with states where these are kept."""

    needs: Needs
    parameters: int
    rows: dict[str, Sequence[Any]]


class EncodedOnce:
    """Rows of ids by split and by how texts enter the model: trainings that follow one another need not tokenize again."""

    def __init__(self) -> None:
        self._rows: dict[Any, Sequence[Any]] = {}

    def around(self, objective: Objective[Any, Any]) -> Objective[Any, Any]:
        def encode(records: Sequence[Any], encoder: Any, entry: Any, *stored: Any) -> Sequence[Any]:
            key = id(records), entry
            if key not in self._rows:
                self._rows[key] = objective.encode(records, encoder, entry, *stored)
            return self._rows[key]

        return replace(objective, encode=encode)


def compare(config: ComparisonConfig, splits: Splitted, directory: Path) -> Comparison:
    """Train what is not trained yet below `directory`; write table, picture and figures there."""
    # 1. one backbone, the readouts that make sense over it, their runs
    backbone, model = one_backbone(config, splits, directory)
    readouts, left_out = fitting_readouts(config, model)
    folder, cache = directory / "runs", runs_root(config) / "state_cache"

    def run_of(readout: ReadoutSettings, learning_rate: float, seed: int) -> Run:
        own = config.run(readout, learning_rate, seed, backbone=backbone, folder=folder, cache=cache)
        stage = "reward_classification" if config.objective == "pairs" else "reward_regression"
        return Run(readout, own, stage_runs_root("", folder, stage) / run_name(own.desc, seed))

    runs = [run_of(readout, rate, seed) for readout in readouts for rate in config.rates for seed in config.seeds]

    # 2. rows and states, once for all
    encoded = EncodedOnce()
    prepared, states = prepare(runs, splits, encoded, model, directory)
    write_text_atomically(directory / DATA_FILE, splits.fingerprint + "\n")

    # 3. train and score
    for number, run in enumerate(runs, start=1):
        if run.finished is None:
            train_and_score(run, splits, prepared[label(run.readout)], encoded)
            after = ""
        else:
            after = ", from before"
        finished = run.finished
        assert finished is not None
        monitor = resolve_monitor(config.trainer.checkpoint.monitor, config.monitored)
        value = "never finite" if finished["best_value"] is None else f"{finished['best_value']:.4f}"
        print(f"[{number}/{len(runs)}] {run.config.desc}, seed {run.config.seed}: {monitor} {value}, {finished['seconds']:.1f} s{after}")
        if not config.keep_models:
            keep_the_best(runs[:number], run, config.trainer.checkpoint.mode)

    # 4. figures
    comparison, chosen = figures(config, splits, runs, prepared, states, left_out, model)
    publish_latest(chosen.directory.parent, chosen.directory / BEST)
    write(comparison, runs, directory)
    return comparison


def runs_root(config: ComparisonConfig) -> Path:
    """Where the directories of comparisons lie."""
    return stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, "reward_comparison")


def one_backbone(config: ComparisonConfig, splits: Splitted, directory: Path) -> tuple[str, RewardModel]:
    """The name of the backbone under all readouts, and the model under one of them; one of `model_init` is built here, once."""
    readout = ReadoutSettings()
    if config.model_name is not None:
        own = config.run(readout, config.rates[0], config.seed, backbone=config.model_name, folder=directory, cache=directory)
        return config.model_name, start_model(own, ())[1]
    place = directory / BACKBONE
    if not place.exists():
        own = config.run(readout, config.rates[0], config.seed, backbone=str(place), folder=directory, cache=directory)
        fresh = own.model_copy(update={"model_name": None, "model_init": config.model_init})
        objective = objective_of(own, splits)
        tokenizer, model = start_model(fresh, (text for record in tokenizer_rows(splits.train) for text in objective.texts(record)))
        with atomic_directory(place) as staging:
            tokenizer.save_pretrained(staging)
            model.backbone.save_pretrained(staging)
        say(f"the backbone is built from model_init and has seen nothing: {place}")
    return str(place), RewardModel.from_backbone(str(place))


def fitting_readouts(config: ComparisonConfig, model: RewardModel) -> tuple[list[ReadoutSettings], dict[str, str]]:
    """The readouts that make sense over the backbone, and why others do not. Raises UserError where one of those was asked for."""
    fitting, left_out = [], {}
    kind = backbone_kind(model.config)
    for number, readout in enumerate(config.candidates):
        try:
            readout_needs(readout, model.config)
            fitting.append(readout)
        except UserError as error:
            if config.readouts is not None:
                raise UserError(*(text.replace("model_params.readout", f"readouts.{number}") for text in error.problems)) from None
            senseless = kind not in READS[readout.name]
            left_out[label(readout)] = f"makes no sense over {KIND_WORDS[kind]}" if senseless else str(error)
            say(f"left out: {label(readout)}, which {left_out[label(readout)]}")
    return fitting, left_out


def objective_of(config: ClassificationConfig | RegressionConfig, splits: Splitted) -> Objective[Any, Any]:
    """What a run learns from."""
    if isinstance(config, ClassificationConfig):
        return pair_objective(config)
    scores = [record.score for record in splits.train]
    return score_objective(config, ScoreTransform.fit(config.model_params.score_transform, scores), scores)


def prepare(
    runs: Sequence[Run], splits: Splitted, encoded: EncodedOnce, model: RewardModel, directory: Path
) -> tuple[dict[str, Prepared], list[States]]:
    """What the runs of each readout share, and the caches of states, which the readouts of most layers fill for the others.

    `model`: over the backbone, with any readout.
    """
    needs = {label(run.readout): readout_needs(run.readout, model.config) for run in runs}
    first = {label(run.readout): run for run in reversed(runs)}
    names = [name for name in ("train", "val", "test") if splits.split(name)]
    path = directory / STATES_SECONDS
    seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    prepared: dict[str, Prepared] = {}
    rows: dict[Needs, dict[str, Sequence[Any]]] = {}
    for name in sorted(first, key=lambda name: -needs[name].layers):
        config, need = first[name].config, needs[name]
        with contextlib.redirect_stdout(io.StringIO()) if rows else contextlib.nullcontext():  # the first has said it
            tokenizer, own = start_model(config, ())
            prepare_model(own, config)
        if need not in rows:
            objective = encoded.around(objective_of(config, splits))
            encoder = text_encoder(config, tokenizer, own)
            rows[need] = {}
            cache = token_cache(config.data.cache_dir, directory.parent, splits.fingerprint, dry_run=False)
            for split in names:
                rows[need][split] = objective.encode(splits.split(split), encoder, own.entry, cache, split)
                for note in encoder.take_notes(split, remedy="raise data.max_length or data.max_prompt_length"):
                    say(note)
            if config.model_params.kept_states is not None:
                clock, _ = clock_of(config)
                started = clock()
                kept = read_from_cache(own, tokenizer, list(rows[need].values()), config, directory)
                rows[need] = dict(zip(names, kept, strict=True))
                seconds.setdefault(" ".join(map(str, need)), clock() - started)
                write_text_atomically(path, json.dumps(seconds) + "\n")
        prepared[name] = Prepared(need, sum(one.numel() for one in own.parameters() if one.requires_grad), rows[need])
    if missing := [name for name in ("train", "val") if not next(iter(rows.values())).get(name)]:
        raise UserError(f"no usable row is left in {' and '.join(missing)}")
    return prepared, shared_states(prepared, seconds)


def shared_states(prepared: Mapping[str, Prepared], seconds: Mapping[str, float]) -> list[States]:
    """The caches that the readouts share; none where the backbone trains. `seconds`: to compute what each need reads."""
    found = []
    for place in dict.fromkeys((one.needs.part, one.needs.token) for one in prepared.values()):
        sharing = {name: one for name, one in prepared.items() if (one.needs.part, one.needs.token) == place}
        widest = max(sharing.values(), key=lambda one: one.needs.layers)
        answer = widest.rows["train"][0].answers[0]
        if isinstance(answer, StartedAnswer):  # one cache, which all of them start from
            cached = answer.states.rows
            size = int(cached.tokens.sum()) * cached.facts.bytes_per_token
            return [States(f"every token {cached.facts.part}", list(prepared), size, sum(seconds.values()))]
        if isinstance(answer, CachedAnswer):
            part, token = place
            what = {"all": "every token", "first": "the first token", "last": "the last token"}[token]
            layers = widest.needs.layers
            where = f"{layers} layers" if layers > 1 else "the last layer"
            kept = f"{what} in {where}{'' if part == 'whole' else f' of the {part}'}"
            cached = answer.states.rows
            size = int(cached.tokens.sum()) * cached.facts.bytes_per_token
            took = sum(value for key, value in seconds.items() if tuple(key.split()[:2]) == place)
            found.append(States(kept, list(sharing), size, took))
    return found


def train_and_score(run: Run, splits: Splitted, prepared: Prepared, encoded: EncodedOnce) -> None:
    """An ordinary training, then the scores of validation and test answers by its best checkpoint; what a killed one left goes."""
    if run.directory.exists():
        shutil.rmtree(run.directory)
    objective = encoded.around(objective_of(run.config, splits))
    clock, _ = clock_of(run.config)
    started = clock()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its log has it
            train(run.config, splits, objective)
    except UserError as error:
        raise UserError(*(f"{run.config.desc}, seed {run.config.seed}: {text}" for text in error.problems)) from error
    summary = json.loads((run.directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    scorer = RewardScorer(
        str(run.directory / BEST),
        batch_size=run.config.data.val_batch_size or run.config.data.batch_size,
        device=str(training_device(run.config.trainer)),
        trust_remote_code=run.config.trust_remote_code,
    )
    scores = {
        split: objective.transform.invert(scorer.score_inputs([answer for row in rows for answer in row.answers]))
        for split, rows in prepared.rows.items()
        if split != "train"
    }
    found = {"seconds": clock() - started, "steps": summary["steps"], "best_value": summary["best_value"], "scores": scores}
    write_text_atomically(run.directory / FINISHED, json.dumps(found) + "\n")


def clock_of(config: RewardConfig) -> tuple[Callable[[], float], str]:
    """What a comparison's times are taken with, and the unit: on a CPU the time of its cores, which does not depend on what runs beside."""
    if training_device(config.trainer).type == "cpu":
        return time.process_time, "core seconds"
    return time.monotonic, "seconds"


def keep_the_best(runs: Sequence[Run], last: Run, mode: str) -> None:
    """Remove the checkpoints of all of a readout's seeds but the best, at the learning rate of `last`."""
    seeds = [run for run in runs if run.config.desc == last.config.desc]
    best = best_run(seeds, mode)
    for run in seeds:
        if run is not best:
            shutil.rmtree(run.directory / CHECKPOINTS_FOLDER, ignore_errors=True)
            for link in (BEST, LAST):
                (run.directory / link).unlink(missing_ok=True)


def best_run(runs: Sequence[Run], mode: str) -> Run:
    """The best by the monitored metric."""
    return min(runs, key=lambda run: worth(finished["best_value"] if (finished := run.finished) else None, mode))


def worth(value: float | None, mode: str) -> float:
    """Less for better values of the monitored metric; nothing is worse than one that was never finite."""
    return float("inf") if value is None else -value if mode == "max" else value


def figures(
    config: ComparisonConfig,
    splits: Splitted,
    runs: Sequence[Run],
    prepared: Mapping[str, Prepared],
    states: list[States],
    left_out: dict[str, str],
    model: RewardModel,
) -> tuple[Comparison, Run]:
    """The figures of every readout at its best learning rate, and the best run of the readout that validates best."""
    mode = config.trainer.checkpoint.mode
    by_readout: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        by_readout.setdefault(label(run.readout), {}).setdefault(run.config.desc, []).append(run)

    def mean_worth(seeds: Sequence[Run]) -> float:
        return fmean(worth(finished["best_value"], mode) for run in seeds if (finished := run.finished) is not None)

    best = {name: min(rates.values(), key=mean_worth) for name, rates in by_readout.items()}
    rows = measured_rows(config, splits, next(iter(prepared.values())).rows)
    readouts = []
    for name, seeds in best.items():
        finished = [found for run in seeds if (found := run.finished) is not None]
        of_split = {
            split: Measured.of(
                [one.measure(found["scores"][split]) for found in finished], one, config.objective, config.bootstrap_samples, config.seed
            )
            for split, one in rows.items()
        }
        readouts.append(
            Compared(
                label=name,
                learning_rate=seeds[0].config.model_params.learning_rate,
                parameters=prepared[name].parameters,
                seconds=[found["seconds"] for found in finished],
                monitored=[found["best_value"] for found in finished],
                tokens="all" if prepared[name].needs.token == "all" else "one",
                val=of_split["val"],
                test=of_split.get("test"),
            )
        )
    chosen = min(best, key=lambda name: mean_worth(best[name]))
    comparison = Comparison(
        objective=config.objective,
        data=Path(config.data.data_dir).name.split(".")[0],
        backbone=model.config.model_type,
        backbone_parameters=sum(parameter.numel() for parameter in model.backbone.parameters()),
        monitor=resolve_monitor(config.trainer.checkpoint.monitor, config.monitored),
        rows={split: len(one.baseline) for split, one in rows.items()},
        questions={split: int(one.groups.max()) + 1 for split, one in rows.items()},
        baseline={split: float(one.baseline.mean()) for split, one in rows.items()},
        seeds=config.seeds,
        unit=clock_of(config)[1],
        states=states,
        readouts=sorted(readouts, key=lambda one: -one.shown.gain),
        chosen=chosen,
        left_out=left_out,
    )
    return comparison, best_run(best[chosen], mode)


def measured_rows(config: ComparisonConfig, splits: Splitted, kept: Mapping[str, Sequence[Any]]) -> dict[str, Rows]:
    """Validation and test rows, as far as they are used (`kept`), with what the rule without a model makes of them."""
    train_mean = fmean(record.score for record in splits.train) if config.objective == "scores" else 0.0
    found = {}
    for split in ("val", "test"):
        used = {row.where for row in kept.get(split, ())}
        records = [record for record in splits.split(split) if record.where in used]
        if records:
            found[split] = Rows.of_pairs(records) if config.objective == "pairs" else Rows.of_scores(records, train_mean)
    return found


def write(comparison: Comparison, runs: Sequence[Run], directory: Path) -> None:
    """Table, picture, figures, and a line for each run."""
    lines = []
    for run in runs:
        finished = run.finished
        assert finished is not None
        lines.append(
            {
                "readout": label(run.readout),
                "learning_rate": run.config.model_params.learning_rate,
                "seed": run.config.seed,
                comparison.monitor: finished["best_value"],
                "steps": finished["steps"],
                "seconds": finished["seconds"],
                "run": run.directory.relative_to(directory),
            }
        )
    write_text_atomically(directory / "comparison.csv", table_csv(lines))
    write_text_atomically(directory / "comparison.json", comparison.json())
    write_text_atomically(directory / "comparison.md", markdown(comparison))
    draw([[comparison]], directory / "comparison.png")
