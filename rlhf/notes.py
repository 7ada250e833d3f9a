"""What a run says about its settings before it starts: those that will never act, and texts that a reward model may have to cut."""

from __future__ import annotations

from common.devices import gpus_at_most
from common.errors import UserError
from common.schema import WandbSettings
from rlhf.config import PPORunConfig
from rlhf.inputs import Sources, prompt_limit
from rlhf.setting_rules import WITHOUT_VALUES


def idle_settings(config: PPORunConfig, steps: int) -> list[str]:
    """A line for each setting without effect. Raises UserError where the policy would never train."""
    params = config.ppo_config
    if params.critic_warmup_steps >= steps:
        raise UserError(
            f"ppo_config.critic_warmup_steps {params.critic_warmup_steps} leaves none of the run's {steps} PPO steps to train the policy"
        )
    given = params.model_fields_set
    notes: list[str] = []

    def idle(names: list[str], why: str) -> None:
        if names:
            notes.append(f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect: {why}")

    if not params.adap_kl_ctrl:
        idle([f"ppo_config.{name}" for name in ("target", "horizon") if name in given], "adap_kl_ctrl is false")
    elif params.init_kl_coef == 0:
        idle(["ppo_config.adap_kl_ctrl"], "the controller multiplies init_kl_coef, which is 0")
    if params.advantage_estimator in WITHOUT_VALUES:
        of_values = [name for name in ("gamma", "lam", "cliprange_value", "vf_coef") if name in given]
        idle([f"ppo_config.{name}" for name in of_values], f"advantage_estimator {params.advantage_estimator} trains no value")
        if params.score_clip is None:
            cancels = ["use_score_norm"] if params.advantage_estimator == "rloo" else ["use_score_scaling", "use_score_norm"]
            names = [f"ppo_config.{name}" for name in cancels if getattr(params, name)]
            it = "it cancels" if len(names) == 1 else "they cancel"
            idle(names, f"{it} where {params.advantage_estimator} compares the answers to a prompt")
    if not params.early_stopping and "target_kl" in given:
        idle(["ppo_config.target_kl"], "early_stopping is false")
    if params.lora is not None and params.lora.lora_dropout > 0:
        idle(["ppo_config.lora.lora_dropout"], "PPO runs without any dropout, so that sampling and update see one policy")
    if params.critic == "model" and config.freeze_config.active:
        notes.append("freeze_config freezes the policy alone: the critic (ppo_config.critic: model) trains whole")
    if config.reward_config.offload and gpus_at_most() == 0:
        idle(["reward_config.offload"], "there is no GPU here, so that all models lie in the CPU's memory")
    if params.log_with != "wandb":
        trackers = [f"ppo_config.{name}" for name in ("tracker_project_name", "tracker_kwargs") if getattr(params, name)]
        usual = WandbSettings()
        changed = [f"wandb.{name}" for name in WandbSettings.model_fields if getattr(config.wandb, name) != getattr(usual, name)]
        idle(trackers + changed, f"ppo_config.log_with is {params.log_with or 'null'}, not wandb")
    return notes


def repeated_prompts(config: PPORunConfig, prompts: int, processes: int = 1) -> list[str]:
    """A line where a batch (of all processes) is larger than the set of prompts, so that it holds some of them more than once."""
    params = config.ppo_config
    if params.prompts_per_batch * processes <= prompts:
        return []
    each = f" / samples_per_prompt {params.samples_per_prompt}" if params.samples_per_prompt > 1 else ""
    together = f" x {processes} processes" if processes > 1 else ""
    return [
        f"ppo_config.batch_size {params.batch_size}{together}{each} exceeds the {prompts} training prompts: within a batch prompts repeat, "
        "each with other answers"
    ]


def lengths_beyond_a_judge(config: PPORunConfig, sources: Sources) -> list[str]:
    """A line for each reward model with the policy's vocabulary that reads fewer tokens than a prompt and its answer may have.

    With another vocabulary lengths do not compare; what was cut there is counted while training (`train/judge_texts_cut`).
    """
    policy, new = sources.policy, config.generation_config.max_new_tokens
    limit = prompt_limit(config, policy.positions, policy.is_encoder_decoder)
    notes: list[str] = []
    for judge in sources.judges:
        if policy.manifest is None or judge.manifest is None or judge.manifest.max_length is None:
            continue
        if judge.manifest.vocabulary_fingerprint != policy.manifest.vocabulary_fingerprint:
            continue
        needed = max(limit, new) if judge.splits_text else limit + new
        if needed > judge.manifest.max_length:
            notes.append(
                f"{judge.setting}: {judge.name} reads {judge.manifest.max_length} tokens, a prompt of {limit} and an answer of {new} have "
                "more: it will judge cut texts (train/judge_texts_cut counts them)"
            )
    return notes
