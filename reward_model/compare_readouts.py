"""Compare readouts: train each of them over one backbone with several seeds, and say which validates best, by how much, at what price.

Every training is one as train_reward.py makes it; with `model_params.freeze_backbone: true` the transformer runs once, and all of them
read its states from one cache. Writes a table, a picture, the figures and the runs into one directory. The test split, where there is one,
is scored by the finished models and chooses nothing.

    python compare_readouts.py --config_file configs/compare_readouts.yaml [section.key=value ...] [--resume [DIRECTORY]]

`--resume` goes on in the newest directory of that `desc`, or in DIRECTORY: what is trained there stays; readouts, seeds and learning
rates may have been added.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parent)

from common.config import parse_command_line, resolved_dict
from common.config_yaml import read_marked_yaml
from common.errors import UserError, both, run_main
from common.failed_start import removed_if_unused
from common.followers import refuse_launchers
from common.notes import say
from common.resume import differences, is_of_another_version
from common.run_length import check_training_length
from common.run_lock import locked
from common.runs import (
    CONFIG_FILE,
    check_start,
    create_run_directory,
    next_free_index,
    run_log,
    run_name,
    stage_runs_root,
    write_config,
)
from common.score_transform import ScoreTransform
from reward_model.classification.margins import check_margins
from reward_model.comparison_config import ComparisonConfig
from reward_model.inputs import Kind, check_fresh_model, check_models, idle_settings, read_training_data
from reward_model.regression.train_reward import check_pairs

# What may differ when a comparison goes on: how much is compared, and what changes no figure.
FREE = ("readouts", "seeds", "learning_rates", "bootstrap_samples", "keep_models", "index", "results_root", "require_clean_git")


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(ComparisonConfig, STAGE_DIR, argv, description=__doc__ or "", resumable=True)
    config = invocation.config
    invocation.print_notes()
    refuse_launchers()
    root = stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, "reward_comparison")
    earlier = None if invocation.resume is None else earlier_directory(config, root, invocation.resume)
    check_start(config, root if earlier is None else None)
    for note in idle_settings(config):
        say(note)
    kind: Kind = "pair" if config.objective == "pairs" else "score"
    _, splits = both(lambda: check_models(config), lambda: read_training_data(config, kind))
    for note in [*splits.notes, *(check_margins(splits, config.model_params) if config.objective == "pairs" else [])]:
        say(note)
    for note in check_training_length(invocation, len(splits.train), config.data.batch_size):
        say(note)
    if earlier is not None:
        check_the_same(config, splits.fingerprint, earlier)
    if config.objective == "scores":
        check_pairs(config, splits.val)
        ScoreTransform.fit(config.model_params.score_transform, [record.score for record in splits.train])
    if invocation.validate_only:
        check_fresh_model(config)
        invocation.say_valid(config.data.data_dir, splits.counts)
        return 0

    from reward_model.comparison import BACKBONE, compare
    from reward_model.comparison_report import markdown

    directory = earlier or create_run_directory(root, config.desc, config.index)
    try:
        with locked(directory), removed_if_unused(directory, also=(BACKBONE,)), run_log(directory):
            write_config(directory, resolved_dict(config))
            print(f"output: {directory}")
            print(f"\n{markdown(compare(config, splits, directory))}")
            print(f"table:   {directory / 'comparison.md'}, comparison.csv, comparison.json\npicture: {directory / 'comparison.png'}")
    except KeyboardInterrupt:
        if not directory.exists():  # nothing was trained yet: what caching has to say holds
            raise
        raise KeyboardInterrupt(f"what is computed and trained so far is kept; --resume {directory} goes on with it") from None
    return 0


def earlier_directory(config: ComparisonConfig, root: Path, wanted: str) -> Path:
    """The comparison to go on with: `wanted`, or for `auto` the one of `index`, or the newest of this `desc`. Raises UserError."""
    index = next_free_index(root, config.desc) - 1 if config.index == "auto" else config.index
    directory = root / run_name(config.desc, index) if wanted == "auto" else Path(wanted)
    if not (directory / CONFIG_FILE).is_file():
        where = f"no comparison of desc {config.desc} in {root}" if wanted == "auto" and index < 0 else f"no comparison in {directory}"
        raise UserError(f"command line: --resume: {where}; without --resume a new one starts")
    return directory


def check_the_same(config: ComparisonConfig, fingerprint: str, directory: Path) -> None:
    """Raise UserError where other settings or other rows than now have been compared in this directory."""
    old = read_marked_yaml(directory / CONFIG_FILE, str(directory / CONFIG_FILE))
    if old.problems:
        raise UserError(*(f"{old.source}:{line}: {problem}" for line, problem in old.problems))
    changes = differences(old.data, resolved_dict(config))
    different = [
        f"{name} {now} (it began with {before})"
        for name, (before, now) in sorted(changes.items())
        if name.split(".")[0] not in FREE and not is_of_another_version(config, name, before, now)
    ]
    if dropped := sorted(set(old.data.get("seeds") or ()) - set(config.seeds)):
        # Of each readout one seed's model is kept, which may be theirs.
        different.append(f"seeds without {', '.join(map(str, dropped))}, which it has trained (more can be added)")
    data = directory / "data_fingerprint.txt"
    if data.is_file() and data.read_text(encoding="utf-8").strip() != fingerprint:
        different.append(f"rows of {config.data.data_dir}")
    if different:
        raise UserError(f"--resume: {directory} compares under other settings: {', '.join(different)}; start a new one without --resume")


if __name__ == "__main__":
    run_main(main)
