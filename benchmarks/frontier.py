"""Score and oracle quality against KL: what PPO achieves beside the best that can be, on the embedded default.

    python benchmarks/frontier.py [--seeds 2 3 4] [--methods PPO RLOO] [--kl_coefs 0.03 0.1 0.4 0.8] [--output results/frontier.json]

For each seed one SFT model and one reward model, trained by the stages' own commands; from these two

    PPO, RLOO    a run of train_ppo.py for each KL coefficient, measured at its checkpoints
    best of n    the highest-scored of n answers of the SFT model, n = 1 to 64
    optimum      the policies that none surpasses at score - coefficient * KL: p(answer) * exp(score / coefficient), normalised

all on the same prompts: the test questions, which no training and no choice of settings saw, and as many training questions, which tell
learning from generalising. The score is what training maximises: the reward model's in its standard deviations, less the penalty of
answers that do not end. KL is in nats per answer from the SFT model: summed over the vocabulary at each token of a policy's sampled
answers; of best of n and the optimum counted among many answers to each prompt (`best_of_n.py`).

What is measured is kept in the work folder at once, so that the command, given again, goes on where it was stopped. Ends with a table, a
JSON file and a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import numpy as np
import torch

from benchmarks.best_of_n import best_of_n, extrapolated, optimum
from benchmarks.frontier_results import BEST_OF_N, OPTIMUM, Measured, draw, save, table, table_lines
from common.command_line import Parser
from common.config import load_config
from common.errors import run_main
from common.evaluation.generate import Answer
from common.models.fused import set_fused
from common.record_types import PromptRecord
from common.records import read_splits
from common.runs import CHECKPOINTS_FOLDER, next_free_index, run_name, write_text_atomically
from examples.measure import Judged, Writer, kl_per_answer, mean_score
from examples.pipeline import CLASSIFICATION, PPO, SFT, CommandFailed, environment, run_plan
from examples.world.oracle import judge
from rlhf.config import PPORunConfig
from rlhf.ppo.rollout import collect_rollout
from rlhf.reward_pipelines.build import build_pipeline


class Method(NamedTuple):
    """What trains: its own settings, and the KL coefficients that are tried unless the command line names others."""

    settings: tuple[str, ...]
    kl_coefs: tuple[float, ...]


METHODS = {
    "PPO": Method((), (0.03, 0.1, 0.4, 0.8)),
    "RLOO": Method(("ppo_config.advantage_estimator=rloo", "ppo_config.samples_per_prompt=8"), (0.1,)),
}
SETTINGS = (
    "global_epochs=1000",
    "ppo_config.steps=300",
    "ppo_config.batch_size=512",
    "ppo_config.ppo_epochs=1",
    "ppo_config.lam=1.0",
    "ppo_config.learning_rate=8.0e-4",
    "ppo_config.lr_schedule=linear",
)
"""Beside the embedded default's: 13 times its answers, each learnt from once, so that the method's limit is seen, not the time's."""
NS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
OPTIMUM_COEFS = tuple(float(coef) for coef in np.geomspace(1000, 0.02, 40))
SPLITS = ("test", "train")


@dataclass(frozen=True)
class Budget:
    """How much is measured."""

    questions: int = 108
    """Of each split."""
    draws: int = 1024
    """Answers of the SFT model to each question."""
    answers: int = 8
    """Answers of a checkpoint to each question."""
    every: int = 50
    """Steps between two checkpoints."""


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    torch.set_num_threads(int(environment()["OMP_NUM_THREADS"]))
    try:
        points = [point for seed in options.seeds for point in measure_seed(seed, options)]
    except CommandFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.code
    rows = table(points)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save(
        options.output,
        {"settings": [*SETTINGS, *options.set], "methods": {name: METHODS[name].settings for name in options.methods}},
        rows,
        points,
    )
    picture = draw(points, options.output.with_suffix(".png"))
    print("\n".join(table_lines(rows)))
    print(f"\nfigures: {options.output}\npicture: {picture}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="of all trainings (default: 2 3 4; 1 chose the settings)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what trains (default: all)")
    own = ", ".join(f"{name} {' '.join(map(str, method.kl_coefs))}" for name, method in METHODS.items())
    parser.add_argument("--kl_coefs", type=float, nargs="+", metavar="COEF", help=f"of every method (default: {own})")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of train_ppo.py")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "frontier", help="models, and what was measured so far")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "frontier.json", help="figures; the picture goes beside them")
    parser.add_argument("--smoke", action="store_true", help="does everything run? moments of training, a few answers")
    options = parser.parse_args(list(argv))
    options.work, options.output = options.work.resolve(), options.output.resolve()
    options.budget = Budget()
    options.shortened = []  # of SFT and reward model
    if options.smoke:
        options.work, options.output = options.work / "smoke", options.work / "smoke" / "frontier.json"
        options.seeds, options.kl_coefs = options.seeds[:1], (options.kl_coefs or [0.1, 0.4])[:2]
        options.budget = Budget(questions=4, draws=16, answers=2, every=1)
        options.set = [*options.set, "ppo_config.steps=2", "ppo_config.batch_size=8", "ppo_config.mini_batch_size=8"]
        options.shortened = ["trainer.params.max_epochs=2"]  # SFT validates at every second
    return options


def measure_seed(seed: int, options: argparse.Namespace) -> Iterator[Measured]:
    """Every point of one seed; what was measured before is read. Raises CommandFailed."""
    folder = options.work / f"seed-{seed}"
    sft, reward_model, runs = folder / "sft/latest", folder / "reward_classification/latest", folder / "rlhf"
    everywhere = [f"seed={seed}", f"results_root={folder}"]
    if not sft.exists():
        run_plan([[(SFT,)]], [*everywhere, *options.shortened])
    if not reward_model.exists():
        run_plan([[(CLASSIFICATION,)]], [*everywhere, f"model_name={sft}", *options.shortened])
    models = [f"ppo_config.model_name={sft}", f"reward_config.reward_model_name={reward_model}"]

    @cache
    def bench() -> Bench:
        return Bench(load_config(PPORunConfig, ROOT / "rlhf/configs/trainer_config.yaml", models), seed, options.budget)

    kept, budget = Kept(folder / "points.jsonl"), vars(options.budget)
    yield from kept.points({"from": "draws", **budget}, lambda: bench().draws())
    for method in options.methods:
        for coef in options.kl_coefs or METHODS[method].kl_coefs:
            settings = [*SETTINGS, *METHODS[method].settings, *options.set, f"ppo_config.init_kl_coef={coef}"]

            def run(method: str = method, coef: float = coef, settings: Sequence[str] = settings) -> list[Measured]:
                desc = f"{method}-{coef:g}"
                saving = [f"desc={desc}", f"save_config.save_interval={options.budget.every}", "save_config.keep_last=1000"]
                run_plan([[(PPO,)]], [*everywhere, *models, *saving, "evaluation.every_n_steps=1000000", *settings])
                newest = run_name(desc, next_free_index(runs, desc) - 1)
                return bench().checkpoints(method, coef, runs / newest / CHECKPOINTS_FOLDER)

            yield from kept.points({"from": settings, **budget}, run)


class Kept:
    """Points on disk, a line for each run: whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def points(self, key: dict[str, Any], measure: Callable[[], list[Measured]]) -> list[Measured]:
        """What stands under `key`; measured first where nothing does."""
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()] if self.path.exists() else []
        found = next((line["points"] for line in lines if line["key"] == key), None)
        if found is not None:
            return [Measured(**point) for point in found]
        points = measure()
        lines.append({"key": key, "points": [vars(point) for point in points]})
        write_text_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        return points


class Bench:
    """Measures policies of one seed: the same prompts, reward model and oracle for all of them."""

    def __init__(self, config: PPORunConfig, seed: int, budget: Budget) -> None:
        self.config, self.seed, self.budget = config, seed, budget
        self.pipeline = build_pipeline(config.reward_config)
        splits = read_splits(config.data_config.data_file_path, "prompt", require=SPLITS)
        self.records: dict[str, list[PromptRecord]] = {name: getattr(splits, name)[: budget.questions] for name in SPLITS}
        self.sft = self._writer(Path(config.ppo_config.model_name))

    def draws(self) -> list[Measured]:
        """Best of n and the optimum, counted among answers of the SFT model."""
        points = []
        for split, records in self.records.items():
            drawn = self.answers(self.sft, records, self.budget.draws)
            arrays = [np.array(values).reshape(len(records), -1) for values in (self.scores(drawn), [one.verdict.score for one in drawn])]
            for method, settings, weigh in ((BEST_OF_N, NS, best_of_n), (OPTIMUM, OPTIMUM_COEFS, optimum)):
                for setting in settings:
                    points.append(Measured(self.seed, method, setting, split, *extrapolated(weigh(setting), *arrays)))
        return points

    def checkpoints(self, method: str, coef: float, folder: Path) -> list[Measured]:
        """The policies that a run saved, by step."""
        points = []
        for checkpoint in sorted(folder.glob("step-*")):
            policy = self._writer(checkpoint)
            for split, records in self.records.items():
                answers = self.answers(policy, records, self.budget.answers)
                kl, score, quality = kl_per_answer(policy, self.sft, answers), fmean(self.scores(answers)), mean_score(answers)
                step = int(checkpoint.name.removeprefix("step-"))
                points.append(Measured(self.seed, method, coef, split, kl, score, quality, step=step))
        return points

    def answers(self, writer: Writer, records: Sequence[PromptRecord], count: int) -> list[Judged]:
        """`count` sampled answers to each question, those to one question side by side."""
        questions = [record.prompt.question for record in records for _ in range(count)]
        generation, ids = self.config.generation_config, writer.prompts(questions)
        rollout = collect_rollout(writer.model, writer.tokenizer, ids, generation, seed=self.seed, batch_size=1024)
        verdict = cache(judge)
        return [
            Judged(question, Answer(text, tuple(tokens), ended), verdict(question, text, ended))
            for question, text, tokens, ended in zip(questions, rollout.texts, rollout.responses, rollout.ended, strict=True)
        ]

    def scores(self, answers: Sequence[Judged]) -> list[float]:
        """What training maximises: the pipeline's score, less the penalty of an answer that did not end."""
        rows = [(one.question, one.answer.text, one.answer.ended) for one in answers]
        questions, texts, ended = zip(*dict.fromkeys(rows), strict=True)
        found = dict(zip(zip(questions, texts, ended, strict=True), self.pipeline.score(questions, texts, ended=ended).scores, strict=True))
        penalty = self.config.ppo_config.missing_eos_penalty or 0.0
        return [found[row] - (0.0 if row[2] else penalty) for row in rows]

    @staticmethod
    def _writer(directory: Path) -> Writer:
        writer = Writer(directory)
        set_fused(writer.model)
        return writer


if __name__ == "__main__":
    run_main(main)
