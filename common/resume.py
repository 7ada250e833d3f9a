"""`--resume`: which checkpoint a run goes on from, and whether config and data still are those it began with. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel

from common.checkpoint import Manifest, Stage, read_manifest, tokenizer_fingerprint, verify_directory
from common.config import Invocation, resolved_dict
from common.disk import check_writable
from common.errors import UserError
from common.failed_start import removed_if_unused
from common.followers import followed_run, follows
from common.launch.workers import check_launch, idle_launch_settings, processes_to_train
from common.notes import say
from common.run_lock import locked, refuse_locked
from common.runs import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    SUMMARY_FILE,
    check_start,
    checkpoints_in,
    create_run_directory,
    is_run_name,
    next_free_index,
    run_log,
    run_name,
    step_of,
)
from common.schema import RunSettings
from common.training_state import STATE_FILES, read_training_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
ABSENT = "nothing"
C = TypeVar("C", bound=RunSettings)

# What may differ when a run goes on: it changes no number. A section stands for all that is in it.
FREE_SETTINGS = frozenset(
    {
        "desc",
        "index",
        "results_root",
        "require_clean_git",
        "tensorboard",
        "wandb",
        "hf_hub_name",
        "launch",
        "data.num_workers",
        "data.cache_dir",
        "data_config.cache_dir",
        "trainer.checkpoint.dirpath",
        "trainer.checkpoint.every_n_train_steps",
        "trainer.checkpoint.keep_last",
        "trainer.checkpoint.keep_best",
        "trainer.process_timeout_s",
        "ppo_config.process_timeout_s",
        "reward_config.offload",
        "trainer.params.enable_progress_bar",
        "trainer.params.max_time",
        "save_config",
        "on_nan",
    }
)


@dataclass(frozen=True)
class ResumePoint:
    """A run that is there already, and where it goes on."""

    run_dir: Path
    checkpoint: Path
    manifest: Manifest
    finished: bool = False
    notes: tuple[str, ...] = field(default=())
    found: tuple[Path, ...] = field(default=())
    """The run's checkpoints when this one was chosen."""

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the training kept beside its weights."""
        return read_training_state(self.checkpoint)

    @property
    def step(self) -> int:
        assert self.manifest.step is not None, "checkpoints of a run know their step"
        return self.manifest.step

    def check_unmoved(self) -> None:
        """Raise UserError where another process has taken the run further since this point was chosen; call it holding the run's lock."""
        if tuple(checkpoints_in(self.run_dir / CHECKPOINTS_FOLDER)) != self.found:
            raise UserError(f"{self.run_dir}: another process has taken the run further in between; start this command again")

    def read_config(self) -> dict[str, Any]:
        """The settings that the run began with. Raises UserError where they cannot be read."""
        path = self.run_dir / CONFIG_FILE
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: cannot be read, and what goes on is compared with it: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            raise UserError(f"{path}: got {type(config).__name__}, expected the settings that the run began with")
        return config

    def check_config(self, config: BaseModel) -> list[str]:
        """Refuse a config under which the run would be another one; returns a line for each other setting that differs.

        A setting that is newer than the run may be at its default, one that is no more may have had any value. Raises UserError with a line
        per setting.
        """
        free, problems = [], []
        for name, (old, new) in differences(self.read_config(), resolved_dict(config)).items():
            if is_of_another_version(config, name, old, new):
                free.append(f"{name}: {f'this version has none, {old} before' if new == ABSENT else f'{new} from here on, {old} before'}")
            elif is_free(name):
                free.append(f"{name}: {new} from here on, {old} before")
            else:
                moved = f" ({name}={old} says it where a link such as `latest` has moved since)" if _are_folders(old, new) else ""
                problems.append(f"{name}: got {new}, but the run began with {old}; a resumed run keeps it{moved}")
        if problems:
            raise UserError(
                *problems,
                f"--resume goes on under the settings of {self.run_dir / CONFIG_FILE}: give the same config and overrides as then; to "
                "train on under others, start a new run from it (trainer.ckpt_path, ppo_config.model_name)",
            )
        return free

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer whose ids mean other text than those that the run's weights have learnt."""
        if tokenizer_fingerprint(tokenizer) != self.manifest.tokenizer_fingerprint:
            raise UserError(f"--resume: the tokenizer is not that of {self.checkpoint}; was the model that the run starts from replaced?")

    def check_data(self, fingerprint: str, *, allow_change: bool) -> str | None:
        """Refuse other training data than the run began with, or, where that is allowed, say so."""
        if fingerprint == self.manifest.data_fingerprint:
            return None
        if not allow_change:
            raise UserError(
                f"{self.checkpoint}: the training data have changed since the run began (fingerprint {fingerprint[:12]}, then "
                f"{str(self.manifest.data_fingerprint)[:12]}); put them back, start a new run, or accept it with --allow_data_change"
            )
        return "the training data have changed since the run began; what follows is not what an undisturbed run would give"


def _are_folders(*values: Any) -> bool:
    return all(isinstance(value, str) and Path(value).is_dir() for value in values)


def is_free(setting: str) -> bool:
    """Whether a resumed run may have another value of this setting (`section.key`)."""
    parts = setting.split(".")
    return any(".".join(parts[:count]) in FREE_SETTINGS for count in range(1, len(parts) + 1))


def is_of_another_version(config: BaseModel, setting: str, old: Any, new: Any) -> bool:
    """Whether a setting (`section.key`) differs as versions do: it is new and nobody has set it, or there is none of that name any more."""
    if ABSENT not in (old, new):
        return False
    *sections, key = setting.split(".")
    for section in sections:
        if section not in type(config).model_fields:
            return True
        if old == ABSENT and section not in config.model_fields_set:
            return True
        config = getattr(config, section)
        if not isinstance(config, BaseModel):
            return False  # a mapping of the user's, say
    if new == ABSENT:
        return key not in type(config).model_fields
    return key in type(config).model_fields and key not in config.model_fields_set


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value before, value now) of each setting that differs; `ABSENT` where one of them has no such setting."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix: (before, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*before, *(name for name in now if name not in before)]:
        found |= differences(before.get(name, ABSENT), now.get(name, ABSENT), f"{prefix}.{name}" if prefix else str(name))
    return found


def resume_point(wish: str | None, root: Path, settings: RunSettings, stage: Stage) -> ResumePoint | None:
    """Where `--resume` goes on; None without it.

    wish: None, `auto` for the newest run of the config's `desc` (or that of its `index`) below `root`, or the path of a run or of one of
    its checkpoints. A damaged checkpoint is named and the one before it taken. Raises UserError where there is nothing to go on from.
    """
    if followed := followed_run():
        wish = str(followed) if wish is not None else None
    if wish is None:
        return None
    return point_in(_run_of(root, settings) if wish == AUTO else Path(wish), stage)


def point_in(path: Path, stage: Stage) -> ResumePoint:
    """Where a run goes on, given its directory (the last good checkpoint is taken) or one of its checkpoints. Raises UserError."""
    run_dir, wanted = _named(path)
    if not follows():
        refuse_locked(run_dir)  # a process that is about to end may still save a newer checkpoint
    found = tuple(checkpoints_in(run_dir / CHECKPOINTS_FOLDER))
    candidates = [wanted] if wanted is not None else found[::-1]
    if not candidates:
        raise UserError(f"{run_dir}: the run has no checkpoint to go on from yet; start it anew, without --resume")
    damaged: list[str] = []
    for checkpoint in candidates:
        problems = _problems(checkpoint)
        if not problems:
            manifest = read_manifest(checkpoint)
            assert manifest is not None, "a checkpoint that verifies has a manifest"
            if manifest.stage != stage:
                raise UserError(f"{checkpoint}: is a checkpoint of stage {manifest.stage}, expected one of {stage}")
            finished = wanted is None and (run_dir / SUMMARY_FILE).is_file()
            notes = tuple(f"damaged, so passed over: {problem}" for problem in damaged)
            return ResumePoint(run_dir, checkpoint, manifest, finished, notes, found)
        damaged += problems
    raise UserError(*damaged, f"{run_dir}: no checkpoint is whole, so there is nothing to go on from; start a new run, without --resume")


def refuse_other_processes(running: int | None, then: int | None) -> None:
    """Raise UserError where a run goes on with another number of processes than it began with; None: not known yet."""
    if running is not None and then is not None and running != then:
        raise UserError(f"--resume: {running} process{'es' if running != 1 else ''} now, {then} when the run began; start as many")


def begin(invocation: Invocation[C], root: Path, stage: Stage) -> ResumePoint | None:
    """Refuse what cannot start or go on, before anything is loaded; returns where a resumed run goes on, None for a new one.

    root: where `stage_runs_root` says that the runs lie.
    """
    check_launch(invocation.config.launch, dry_run=invocation.dry_run)
    for note in idle_launch_settings(invocation.config.launch):
        say(note)
    point = resume_point(invocation.resume, root, invocation.config, stage)
    check_start(invocation.config, root if point is None else None)
    if point is None or not point.finished:
        check_writable(root if point is None else point.run_dir)
    if point is not None and not point.finished:
        refuse_other_processes(processes_to_train(invocation.config), point.manifest.processes)
    if point is not None:
        for note in [*point.notes, *point.check_config(invocation.config)]:
            say(note)
        if not point.finished:
            say(f"going on with {point.run_dir} after step {point.step:,}")
    return point


def check_data(invocation: Invocation[C], point: ResumePoint | None, fingerprint: str) -> None:
    """As `ResumePoint.check_data`, as the command line says; what is allowed is said."""
    if point is not None and (note := point.check_data(fingerprint, allow_change=invocation.options.allow_data_change)):
        say(note)


def run_directory(point: ResumePoint | None, root: Path, settings: RunSettings) -> Path:
    """The directory of a run that goes on, or a new one."""
    return create_run_directory(root, settings.desc, settings.index) if point is None else point.run_dir


@contextlib.contextmanager
def holding(run_dir: Path, point: ResumePoint | None) -> Iterator[None]:
    """Write a run inside, which goes on at `point` or is new: no other process may, and a run that never began leaves nothing."""
    with locked(run_dir):
        if point is not None:
            point.check_unmoved()
        with removed_if_unused(run_dir):
            yield


@contextlib.contextmanager
def writing(run_dir: Path, point: ResumePoint | None) -> Iterator[None]:
    """As `holding`, and what is printed goes into the run's log."""
    with holding(run_dir, point), run_log(run_dir):
        yield


def say_finished(point: ResumePoint) -> None:
    """What a resumed run that has ended already says, and how to make again the steps whose checkpoints are damaged."""
    last = step_of(point.found[-1])
    print(f"{point.run_dir} is finished (step {last}); nothing is left to do, and nothing was written")
    if point.step < last:
        say(f"to make the steps after {point.step} again, whose checkpoints are damaged: --resume {point.checkpoint}")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half removed beside the checkpoints; call it while holding the run's lock."""
    for path in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def _named(wish: Path) -> tuple[Path, Path | None]:
    """Run directory and checkpoint that a path names; None: the run's last good one."""
    path = Path(os.path.abspath(wish))
    if path.is_symlink():
        path = path.resolve()  # `last`, `best`, `latest`
    if not path.is_dir():
        raise UserError(f"--resume: {wish} is no directory; expected a run (…/desc-…,index-N) or one of its checkpoints")
    if path.parent.name == CHECKPOINTS_FOLDER:
        if path not in checkpoints_in(path.parent):
            raise UserError(f"--resume: {wish} is no checkpoint of its run any more; rename it to step-N first, N as it was")
        return path.parent.parent, path
    if not (path / CONFIG_FILE).is_file() and not is_run_name(path.name):  # a run that was killed at once has none yet
        raise UserError(
            f"--resume: {wish} is neither a run (it has no {CONFIG_FILE}) nor a checkpoint in a run's {CHECKPOINTS_FOLDER} folder"
        )
    return path, None


def _run_of(root: Path, settings: RunSettings) -> Path:
    index = next_free_index(root, settings.desc) - 1 if settings.index == "auto" else int(settings.index)
    run_dir = root / run_name(settings.desc, index)
    if index < 0 or not run_dir.is_dir():
        what = f"no run of desc {settings.desc!r} there" if settings.index == "auto" else f"no {run_dir.name} there"
        raise UserError(f"--resume: {root}: {what} to go on with; start it without --resume, or give the path of a run")
    return run_dir


def _problems(checkpoint: Path) -> list[str]:
    problems = verify_directory(checkpoint)
    if not problems and not all((checkpoint / name).is_file() for name in STATE_FILES):
        problems = [f"{checkpoint}: holds no state of the training ({', '.join(STATE_FILES)}), weights alone"]
    return problems
