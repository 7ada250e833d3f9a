"""What PPO starts from, checked before torch is imported: models that fit together, options with a reader, and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common.devices import check_bfloat16
from common.errors import UserError
from common.model_init import check_room
from common.model_source import ModelSource, check_joinable, check_layers, check_length, check_same_vocabulary
from common.record_types import PromptRecord, question_key
from common.records import Splits, read_rows
from common.start_files import check_start_files
from rlhf.config import PPOData, PPORunConfig
from rlhf.reward_pipelines.build import check_columns, check_pipeline
from rlhf.sampling_options import check_sampling_options

UNLIMITED_PROMPT = 512
"""Prompt tokens where neither config, manifest nor positions set a limit (T5)."""


@dataclass(frozen=True)
class Sources:
    """The models of a run as their files describe them."""

    policy: ModelSource
    judges: tuple[ModelSource, ...]
    prompt_format: Literal["qa", "chat"]


def check_models(config: PPORunConfig) -> Sources:
    """Raise UserError, with every problem found, where models are missing or do not fit each other or the settings."""
    problems: list[str] = []

    def collect(error: UserError) -> None:
        problems.extend(error.problems)

    if not config.generation_config.do_sample:
        problems.append("generation_config.do_sample: got false; PPO learns from different answers to a question, set it to true")
    try:
        check_sampling_options(config.generation_config, setting="generation_config")
    except UserError as error:
        collect(error)
    bfloat16 = {
        "ppo_config.mixed_precision": config.ppo_config.mixed_precision,
        "ppo_config.model_dtype": config.ppo_config.model_dtype,
        "reward_config.model_dtype": config.reward_config.model_dtype,
    }
    try:
        check_bfloat16(bfloat16, "use float32 (mixed_precision: no)")
    except UserError as error:
        collect(error)
    policy = None
    judges: list[ModelSource] = []
    try:
        policy = check_start_files(
            config.ppo_config.model_name,
            config.ppo_config.model_pretrain,
            base_setting="ppo_config.model_name",
            setting="ppo_config.model_pretrain",
            role="generator",
            trust_remote_code=config.trust_remote_code,
        )
        prompt_limit(config, policy.positions, policy.is_encoder_decoder)
        check_layers(config.freeze_config.layers_not_to_freeze, policy.config or {}, "freeze_config")
    except UserError as error:
        collect(error)
    try:
        judges = check_pipeline(config.reward_config, trust_remote_code=config.trust_remote_code)
    except UserError as error:
        collect(error)
    if policy is None or problems:
        raise UserError(*problems)
    wanted = config.data_config.prompt_format
    prompt_format: Literal["qa", "chat"] = "chat" if check_joinable(policy, judges, prompt_format=wanted) == "chat" else "qa"
    limit = prompt_limit(config, policy.positions, policy.is_encoder_decoder)
    check_room(policy, limit, prompt_format, "data_config.max_prompt_length", answer=False)
    if config.ppo_config.critic == "model":
        _check_critic(config, policy, judges)
    return Sources(policy, tuple(judges), prompt_format)


def _check_critic(config: PPORunConfig, policy: ModelSource, judges: Sequence[ModelSource]) -> None:
    """The critic reads the policy's ids with the first reward model's transformer."""
    if not judges:
        raise UserError("ppo_config.critic: got model, but reward_config has no reward model to start it from; use head")
    judge = judges[0]
    check_same_vocabulary(policy, judge)
    if judge.config is not None and policy.config is not None and judge.is_encoder_decoder != policy.is_encoder_decoder:
        raise UserError(f"ppo_config.critic: got model, but {judge.name} and the policy {policy.name} are of different kinds; use head")
    length = prompt_limit(config, policy.positions, policy.is_encoder_decoder) + config.generation_config.max_new_tokens
    check_length(judge, length, f"max_prompt_length + max_new_tokens = {length} (ppo_config.critic: model)")


def prompt_limit(config: PPORunConfig, positions: int | None, is_encoder_decoder: bool) -> int:
    """Prompt tokens at most. Raises UserError where prompt and answer do not fit the model's positions together."""
    new, wished = config.generation_config.max_new_tokens, config.data_config.max_prompt_length
    if positions is None:
        return wished or UNLIMITED_PROMPT
    if is_encoder_decoder:
        if new > positions:
            raise UserError(f"generation_config.max_new_tokens {new} exceeds the policy's {positions} positions")
        return min(wished or positions, positions)
    if wished is not None and wished + new > positions:
        raise UserError(
            f"data_config.max_prompt_length {wished} + generation_config.max_new_tokens {new} = {wished + new} exceeds the "
            f"{positions} positions of the policy {config.ppo_config.model_name}; lower one of them"
        )
    if new >= positions:
        raise UserError(f"generation_config.max_new_tokens {new} leaves no room for a prompt in the policy's {positions} positions")
    return wished if wished is not None else positions - new


def read_prompts(config: PPORunConfig) -> Splits[PromptRecord]:
    """Training and evaluation prompts. Raises UserError where the rows lack a column that a reward function asks for."""
    data = config.data_config
    splits: Splits[PromptRecord] = read_rows(
        data.data_file_path, "prompt", data, seed=config.seed, require=("train", "val"), setting="data_config.data_file_path"
    )
    columns = dict.fromkeys([*column_names(splits.train), *column_names(splits.val)])
    check_columns(config.reward_config, columns)
    return replace(splits, train=with_columns(splits.train, columns), val=with_columns(splits.val, columns))


def column_names(records: Sequence[PromptRecord]) -> list[str]:
    """The names of all columns, in the order of their appearance."""
    if isinstance(records, list):
        return list(dict.fromkeys(name for record in records for name in record.columns))
    return records.column_names()  # type: ignore[attr-defined, no-any-return]


def with_columns(records: Sequence[PromptRecord], columns: Iterable[str]) -> Sequence[PromptRecord]:
    """Every row with all columns, None where it has none: a reward function that asks for one gets it for every batch."""
    if not isinstance(records, list):
        return records.with_columns(columns)  # type: ignore[attr-defined, no-any-return]
    return [replace(record, columns={**dict.fromkeys(columns), **record.columns}) for record in records]


def training_prompts(splits: Splits[PromptRecord], data: PPOData) -> Sequence[PromptRecord]:
    """The training prompts of one pass, in the file's order."""
    return unique(splits.train) if data.unique_prompts else splits.train


def unique(records: Sequence[PromptRecord]) -> Sequence[PromptRecord]:
    """The first row of each question."""
    if not isinstance(records, list):
        return records.first_of_each_question()  # type: ignore[attr-defined, no-any-return]
    first: dict[str, PromptRecord] = {}
    for record in records:
        first.setdefault(question_key(record.prompt), record)
    return list(first.values())


def total_steps(config: PPORunConfig, prompts: int, world_size: int = 1) -> int:
    """PPO steps of the run: whole batches in `global_epochs` passes, or fewer by `ppo_config.steps`."""
    params = config.ppo_config
    batch = params.prompts_per_batch * world_size
    available = prompts * config.global_epochs // batch
    if available == 0:
        asked = f" ({params.samples_per_prompt} answers to each)" if params.samples_per_prompt > 1 else ""
        raise UserError(
            f"{prompts} prompts x global_epochs {config.global_epochs} make no batch of {batch}{asked}; lower ppo_config.batch_size or "
            "raise global_epochs"
        )
    return min(available, params.steps or available)
