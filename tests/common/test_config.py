"""Configs: what is read, what is refused, and in which words."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import Invocation, load_config, parse_command_line, resolved_dict
from common.config_keys import SIGNS
from common.errors import UserError
from common.evaluation.config import GenerationTestConfig
from common.lightning_arguments import ARGUMENTS, STAGE_OWNED_ARGUMENTS, lightning_argument_problems
from common.schema import Section
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig
from rlhf.config import PPORunConfig
from sft.config import SFTConfig

ROOT = Path(__file__).resolve().parents[2]
OLD_CONFIGS = Path(__file__).parent / "old_configs"
SFT = "data:\n  data_dir: data/a.json\nmodel_name: some/model\n"
PPO = """\
data_config: {data_file_path: a.json}
ppo_config:
  model_name: ../sft/models/latest
reward_config:
  reward_model_name: ../reward
"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "set, so that it is restored")
    monkeypatch.delenv("WANDB_API_KEY")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage folder with `configs/`, and the working directory elsewhere."""
    (tmp_path / "stage/configs").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "stage"


def write(stage: Path, text: str | bytes) -> Path:
    path = stage / "configs/c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def invoke(schema: type[Any], stage: Path, text: str | bytes, *arguments: str, resumable: bool = False) -> Invocation[Any]:
    path = write(stage, text)
    return parse_command_line(schema, stage, ["--config", str(path), *arguments], description="", resumable=resumable)


def problems(schema: type[Section], stage: Path, text: str | bytes, *arguments: str) -> list[str]:
    """What is refused, with the config's path written `C`."""
    with pytest.raises(UserError) as caught:
        invoke(schema, stage, text, *arguments)
    return [problem.replace(str(stage / "configs/c.yaml"), "C") for problem in caught.value.problems]


# --- malformed configs -------------------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "classification": ClassificationConfig,
    "regression": RegressionConfig,
    "ppo": PPORunConfig,
    "generation_test": GenerationTestConfig,
    "reward_test": RewardTestConfig,
}
MALFORMED: list[dict[str, Any]] = [
    *yaml.safe_load(Path(__file__).with_name("malformed_configs.yaml").read_text()),
    {"case": "not UTF-8", "schema": "sft", "config": b"desc: \xff\n", "expected": ["C: not UTF-8 at byte 6"]},
    {
        "case": "control character",
        "schema": "sft",
        "config": "seed: 1\ndesc: a\x07b\n",
        "expected": ["C:2: broken YAML: character '\\x07' is not allowed"],
    },
    {
        "case": "huge",
        "schema": "sft",
        "config": SFT + "model_params: {dropout: 1" + "0" * 400 + "}\n",
        "expected": ["C:4: model_params.dropout: got a number of 1329 bits, expected a number >= 0 and < 1 or null"],
    },
    {
        "case": "more digits than Python reads",
        "schema": "sft",
        "config": SFT + "seed: " + "9" * 5000 + "\n",
        "expected": [f"C:4: seed: got '{'9' * 40}', expected a value that fits", "C:4: seed: got null, expected a whole number >= 0"],
    },
]


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case["case"])
def test_malformed_configs_are_refused_line_by_line(case: dict[str, Any], stage: Path) -> None:
    path = write(stage, "")
    before = sorted(stage.parent.rglob("*"))
    assert path in before
    lines = problems(SCHEMAS[case["schema"]], stage, case["config"], *case.get("overrides", ()))
    assert len(lines) == len(case["expected"]), lines
    for line, start in zip(lines, case["expected"], strict=True):
        assert line.startswith(start), line
        assert "\n" not in line
    assert sorted(stage.parent.rglob("*")) == before  # nothing made
    assert "WANDB_API_KEY" not in os.environ


def test_the_table_covers_what_it_should() -> None:
    assert len(MALFORMED) >= 60
    assert len({case["case"] for case in MALFORMED}) == len(MALFORMED)


def test_deep_nesting_and_alias_bombs_are_one_line(stage: Path) -> None:
    assert problems(SFTConfig, stage, "a: " + "[" * 5000) == ["C:1: broken YAML: nested too deeply"]
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8))
    start = time.monotonic()
    lines = problems(SFTConfig, stage, bomb)
    assert time.monotonic() - start < 10
    assert any("aliases (*) make more than 10,000 values" in line for line in lines)


def test_a_run_s_comma_inside_braces_is_named(stage: Path) -> None:
    assert problems(SFTConfig, stage, SFT, "trainer={ckpt_path: models/desc-a,index-1/best}") == [
        "override trainer: trainer.index-1/best: a comma inside {…} begins a new entry; quote the path of the run: '…,index-1/best'",
    ]


def test_keys_with_line_breaks_stay_on_one_line(stage: Path) -> None:
    known = len(SFTConfig.model_fields)
    assert problems(SFTConfig, stage, SFT + '"a\\nb": 1\n', 'wandb."c\nd"=1') == [
        "override 'wandb.\"c\\nd\"': 'wandb.c\\nd': unknown key; expected one of api, args, project_name, mode, log_model",
        f"C:4: 'a\\nb': unknown key; the nearest of the {known} known ones: wandb, data, on_nan, launch, trainer",
    ]


PIECES = (
    "data:", "  data_dir: a", "model_name: m", "  a: &x [1, *x]", "trainer: {params: {devices: [}}", "model_params:", "  lora: {r: 2}",
    "  - b", "  adam_betas: [1, {a: 2}]", "wandb: {api: [c]}", "<<: 3", "? [a]", "? {b: 1}", "seed: !!float x", "index: 1e400", "\t",
    "model_init: null", "'", '"', "{", "]", "#", "--- ", "%YAML 9", "@", "\u2028", "é: \U0001f600", "a: b: c", "~: 1", "desc: >", "   x",
    "data: {columns: {1: 2, a: b}}",
)  # fmt: skip
OVERRIDES = (
    "a", "=", "=1", "data.x.y=2", "model_params.adam_betas.0=5", "trainer.params.a=1", "data=", "data={", '"a.b"=1', 'a"b=2', "trainer=3",
    "trainer.params=3", "data.columns.a.b=3", "seed=[", "model_init.config.x.y=2", "evaluation.generate_params.x.y=z", "wandb.api=null",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("\n".join), st.text(), st.binary(max_size=60)),
    overrides=st.lists(st.sampled_from(OVERRIDES), max_size=3),
)
def test_any_bytes_give_a_config_or_lines(text: str | bytes, overrides: list[str], stage: Path) -> None:
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    try:
        config = invoke(SFTConfig, stage, content, *overrides).config
    except UserError as error:
        assert all(problem and "\n" not in problem for problem in error.problems)
    else:
        assert isinstance(config, SFTConfig)


# --- the command line --------------------------------------------------------------------------------------------------------------


def test_missing_config_names_its_neighbours(stage: Path) -> None:
    write(stage, SFT)
    with pytest.raises(UserError, match=r"configs/other.yaml: no such config file \(looked for .*\); \.\./stage/configs holds c.yaml$"):
        parse_command_line(SFTConfig, stage, ["--config", str(stage / "configs/other.yaml")], description="")
    Path("unrelated.yaml").touch()  # a file of the working directory is no config of the stage
    with pytest.raises(UserError, match=r"^x.yaml: no such config file \(looked for .*/here/x.yaml\); \.\./stage/configs holds c.yaml$"):
        parse_command_line(SFTConfig, stage, ["--config", "x.yaml"], description="")
    with pytest.raises(UserError, match=r"^configs/c.yaml: no such config file; did you mean \.\./stage/configs/c.yaml\?$"):
        parse_command_line(SFTConfig, stage, ["--config", "configs/c.yaml"], description="")
    with pytest.raises(UserError, match=r"^nowhere/x.yaml: no such config file \(looked for .*/here/nowhere/x.yaml\)"):
        parse_command_line(SFTConfig, stage, ["--config", "nowhere/x.yaml"], description="")
    with pytest.raises(UserError, match=r"is a directory, expected a YAML file"):
        parse_command_line(SFTConfig, stage, ["--config", str(stage)], description="")
    with pytest.raises(UserError, match=r"^command line: --config FILE is missing"):
        parse_command_line(SFTConfig, stage, ["seed=1"], description="")


def test_signs_of_scripts_are_keys_of_their_schemas() -> None:
    schemas = {
        "sft/train_sft.py or a train_reward.py": (SFTConfig, ClassificationConfig, RegressionConfig),
        "rlhf/train_ppo.py": (PPORunConfig,),
        "sft/test_sft.py or rlhf/test_ppo.py": (GenerationTestConfig,),
        "a test_reward.py": (RewardTestConfig,),
    }
    assert schemas.keys() == SIGNS.keys()
    for script, keys in SIGNS.items():
        fields = [{*schema.model_fields} for schema in schemas[script]]
        assert all(keys <= names for names in fields)
        assert all(set(SIGNS[other]) - names for other in SIGNS for names in fields if other != script and not SIGNS[other] < keys)


@pytest.mark.parametrize("option", ["--config", "--config_file", "--config_path"])
def test_config_has_three_names(option: str, stage: Path) -> None:
    path = write(stage, SFT)
    assert parse_command_line(SFTConfig, stage, [option, str(path)], description="").config_path == path


def test_the_same_file_twice_is_fine_but_not_two(stage: Path) -> None:
    path = write(stage, SFT)
    both = ["--config", str(path), "--config_file"]
    assert parse_command_line(SFTConfig, stage, [*both, os.path.relpath(path)], description="").config_path.samefile(path)
    with pytest.raises(
        UserError, match=r"^command line: --config, --config_file and --config_path are one option, got .*c.yaml and other.yaml$"
    ):
        parse_command_line(SFTConfig, stage, [*both, "other.yaml"], description="")


def test_overrides_stand_anywhere_and_options_may_be_added(stage: Path) -> None:
    path = write(stage, SFT)
    argv = ["seed=1", "--config", str(path), "desc=a", "--validate", "--compare", "M", "index=3"]
    invocation = parse_command_line(SFTConfig, stage, argv, description="", add_options=lambda parser: parser.add_argument("--compare"))
    assert (invocation.config.seed, invocation.config.desc, invocation.config.index) == (1, "a", 3)
    assert invocation.validate_only and invocation.options.compare == "M" and invocation.resume is None
    with pytest.raises(UserError, match=r"^command line: unrecognized arguments: --compare"):
        parse_command_line(SFTConfig, stage, argv, description="")


def test_resume_takes_a_path_or_none(stage: Path) -> None:
    (Path.cwd() / "run").mkdir()
    assert invoke(SFTConfig, stage, SFT, resumable=True).resume is None
    assert invoke(SFTConfig, stage, SFT, "--resume", resumable=True).resume == "auto"
    assert invoke(SFTConfig, stage, SFT, "--resume", "run", resumable=True).resume == str(Path.cwd() / "run")
    overridden = invoke(SFTConfig, stage, SFT, "--resume", "seed=7", resumable=True)
    assert (overridden.resume, overridden.config.seed) == ("auto", 7)
    with pytest.raises(UserError, match=r"--allow_data_change acts on a run that goes on; add --resume"):
        invoke(SFTConfig, stage, SFT, "--allow_data_change", resumable=True)
    with pytest.raises(UserError, match="unrecognized arguments: --resume"):
        invoke(SFTConfig, stage, SFT, "--resume")


def test_help_exits_with_0(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(SFTConfig, stage, ["--help"], description="Trains.")
    assert caught.value.code == 0
    assert "--config_path FILE" in capsys.readouterr().out


# --- values ------------------------------------------------------------------------------------------------------------------------


def test_scalars_are_read_as_meant(stage: Path) -> None:
    text = SFT + (
        "seed: 010\ndesc: yes\nmodel_params: {learning_rate: 1e-5, weight_decay: 0, adam_betas: [0, .95], dropout: 1.e-1}\n"
        "wandb: {project_name: 2024-01-01, args: {name: on}}\nevaluation: {num_generated: 4.0}\n"
        "trainer: {params: {max_time: '00:01:00:00', devices: 1_0, precision: !!str 32, 1: x}}\n"
    )
    with pytest.raises(UserError, match=r"trainer.params.1: unknown argument"):
        invoke(SFTConfig, stage, text)
    config = invoke(SFTConfig, stage, text.replace(", 1: x", "")).config
    assert (config.seed, config.desc, config.wandb.project_name, config.wandb.args.name) == (10, "yes", "2024-01-01", "on")
    assert (config.model_params.learning_rate, config.model_params.weight_decay, config.model_params.dropout) == (1e-5, 0.0, 0.1)
    assert config.model_params.adam_betas == (0.0, 0.95)
    assert config.evaluation.num_generated == 4 and isinstance(config.evaluation.num_generated, int)
    assert config.trainer.params == {"max_time": "00:01:00:00", "devices": 10, "precision": "32"}


def test_merge_keys_and_a_bom_are_read(stage: Path) -> None:
    text = "\ufeffdata: {data_dir: a}\nmodel_name: m\nwandb: &w {project_name: p, mode: offline}\ntrainer:\n  checkpoint: {}\n"
    config = invoke(
        SFTConfig, stage, text.replace("&w {project_name: p, mode: offline}", "{<<: {project_name: p, mode: offline}, mode: online}")
    ).config
    assert (config.wandb.project_name, config.wandb.mode) == ("p", "online")


def test_free_mappings_take_any_key_from_file_and_command_line(stage: Path) -> None:
    text = PPO.replace("reward_config:", "  tracker_kwargs: {a.b: 1, c-d: 2, wandb: {tags: [x]}}\nreward_config:")
    arguments = (
        "ppo_config.tracker_kwargs.a.b=3",  # a key with a dot that is there already
        'ppo_config.tracker_kwargs."e.f"=4',  # a new one, in quotes
        "ppo_config.tracker_kwargs.wandb.name=n",  # else a dot leads into the mapping
        "generation_config.num-beams.x=5",
        "generation_config.num_beams=2",
        "data_config.columns.my.title=Question",
    )
    config = invoke(PPORunConfig, stage, text, *arguments).config
    assert config.ppo_config.tracker_kwargs == {"a.b": 3, "c-d": 2, "wandb": {"tags": ["x"], "name": "n"}, "e.f": 4}
    assert config.generation_config.model_extra == {"num-beams": {"x": 5}, "num_beams": 2}
    assert config.data_config.columns == {"my.title": "Question"}


def test_overrides_reach_into_lists_null_sections_and_missing_ones(stage: Path) -> None:
    text = "data: {data_dir: a}\nmodel_init: null\nmodel_params: {adam_betas: [0.9, 0.95]}\n"
    config = invoke(
        SFTConfig, stage, text, "model_params.adam_betas.0=0.8", "model_init.vocab_size=300", "trainer.params.max_epochs=7"
    ).config
    assert config.model_params.adam_betas == (0.8, 0.95)
    assert config.model_init.vocab_size == 300
    assert config.trainer.params == {"max_epochs": 7}


def test_later_overrides_win_and_an_emptied_key_is_null(stage: Path) -> None:
    config = invoke(SFTConfig, stage, SFT, "seed=1", "seed=2", "model_name=", "model_init={}").config
    assert config.seed == 2 and config.model_name is None


# --- paths -------------------------------------------------------------------------------------------------------------------------


def test_paths_count_from_the_stage_in_a_file_and_from_here_on_the_command_line(stage: Path) -> None:
    here = Path.cwd()
    invocation = invoke(SFTConfig, stage, SFT + "trainer: {ckpt_path: ../other/run}\n", "data.validation_file=val.json")
    config = invocation.config
    assert config.data.data_dir == str(stage / "data/a.json")
    assert config.data.validation_file == str(here / "val.json")
    assert config.trainer.ckpt_path == str(stage.parent / "other/run")
    assert config.trainer.checkpoint.dirpath == str(stage / "models")  # a default is the stage's, too
    assert f"data.data_dir: data/a.json is {stage / 'data/a.json'}" in invocation.notes
    assert f"data.validation_file: val.json is {here / 'val.json'}" in invocation.notes


@pytest.mark.parametrize("given", ["", "trainer: {}\n", "trainer: {params: {max_epochs: 1}}\n", "trainer: {checkpoint: {mode: max}}\n"])
def test_default_paths_are_the_stages_however_little_is_given(given: str, stage: Path) -> None:
    assert invoke(SFTConfig, stage, SFT + given).config.trainer.checkpoint.dirpath == str(stage / "models")


@pytest.mark.parametrize("given", ["results_root=/r", "launch.storage_path=/r", "RESULTS_ROOT_DIR"])
def test_a_folder_of_runs_that_is_not_used_is_named(given: str, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [given] if "=" in given else []
    if not overrides:
        monkeypatch.setenv(given, "/r")
    sft = invoke(SFTConfig, stage, SFT + "trainer: {checkpoint: {dirpath: models}}\n", *overrides)
    ppo = invoke(PPORunConfig, stage, PPO + "save_config: {checkpoint_dir: /elsewhere}\n", *overrides)
    assert [note for note in sft.notes if "dirpath" in note] == [
        "trainer.checkpoint.dirpath: models is without effect, since runs lie in /r"
    ]
    assert "save_config.checkpoint_dir: /elsewhere is without effect, since runs lie in /r" in ppo.notes
    assert not [note for note in invoke(SFTConfig, stage, SFT, *overrides).notes if "dirpath" in note]


def test_absent_sections_keep_the_default_of_their_field(stage: Path) -> None:
    config = invoke(GenerationTestConfig, stage, "model_name: m\ndata: {data_dir: a}\n").config
    assert config.wandb.mode == "disabled"
    assert config.test_params.log_file == str(stage / "models/evaluation.csv")


def test_hub_names_absolute_paths_and_data_sets_stay(stage: Path) -> None:
    config = invoke(
        SFTConfig, stage, "data: {data_dir: 'hf:some/set:main'}\nmodel_name: EleutherAI/gpt-neo-125m\nresults_root: /r\n"
    ).config
    assert (config.data.data_dir, config.model_name, config.results_root) == ("hf:some/set:main", "EleutherAI/gpt-neo-125m", "/r")


def test_a_model_name_that_is_a_folder_is_a_path(stage: Path) -> None:
    (stage / "models/m").mkdir(parents=True)
    (Path.cwd() / "m").mkdir()
    assert invoke(SFTConfig, stage, SFT, "model_name=m").config.model_name == str(Path.cwd() / "m")
    assert invoke(SFTConfig, stage, SFT.replace("some/model", "models/m")).config.model_name == str(stage / "models/m")


def test_reward_functions_are_found_from_the_stage(stage: Path) -> None:
    text = PPO.replace("reward_model_name: ../reward", "pipeline: {type: function, path: '../mine.py:score'}")
    assert invoke(PPORunConfig, stage, text).config.reward_config.pipeline.path == f"{stage.parent / 'mine.py'}:score"
    assert (
        invoke(PPORunConfig, stage, text, "reward_config.pipeline.path=here.py:f").config.reward_config.pipeline.path
        == f"{Path.cwd() / 'here.py'}:f"
    )
    assert (
        invoke(PPORunConfig, stage, text, "reward_config.pipeline.path=package.mine:f").config.reward_config.pipeline.path
        == "package.mine:f"
    )


def test_load_config_counts_from_the_folder_above_configs(stage: Path) -> None:
    assert load_config(SFTConfig, write(stage, SFT)).data.data_dir == str(stage / "data/a.json")
    assert load_config(SFTConfig, write(stage, SFT), ["seed=3"], base_dir=Path("/base")).data.data_dir == "/base/data/a.json"


# --- old names ---------------------------------------------------------------------------------------------------------------------


def old(name: str) -> str:
    return (OLD_CONFIGS / f"{name}.yaml").read_text()


def test_an_old_sft_config_is_read(stage: Path) -> None:
    invocation = invoke(SFTConfig, stage, old("sft"))
    config = invocation.config
    assert (config.data.truncate_prompt, config.trainer.checkpoint.monitor) == (True, "val_loss")
    assert (config.model_params.learning_rate, config.model_params.active) == (2e-5, True)
    assert (config.wandb.api, config.wandb.project) == (None, "cqa")
    notes = [note.split(": ", 1)[1] for note in invocation.notes if "read as" in note]
    assert set(notes) == {"data.truncate_promt is read as truncate_prompt", "trainer.checkpoint.log_obg is read as monitor"}
    assert "WANDB_API_KEY" not in os.environ  # `text` is no key


def test_an_old_regression_config_is_read(stage: Path) -> None:
    config = invoke(RegressionConfig, stage, old("regression")).config
    assert config.model_params.loss_name == "mae"
    assert config.model_params.do_freeze is None and config.model_params.active
    assert config.data.max_prompt_length == 384


def test_an_old_ppo_config_is_read(stage: Path) -> None:
    invocation = invoke(PPORunConfig, stage, old("ppo"))
    config = invocation.config
    assert (config.data_config.max_prompt_length, config.data_config.truncate_prompt, config.global_epochs) == (256, True, 2)
    assert (config.ppo_config.mini_batch_size, config.ppo_config.minibatch, config.generation_config.top_k) == (16, 16, 0)
    assert isinstance(config.generation_config.top_k, int)
    path = stage / "configs/c.yaml"
    obsolete = [note for note in invocation.notes if "obsolete" in note]
    assert [note.split(": ")[1].split(" ")[0] for note in obsolete] == [
        "ppo_config.remove_unused_columns", "ppo_config.optimize_cuda_cache", "ppo_config.compare_steps",
    ]  # fmt: skip
    assert obsolete[0] == (
        f"{path}:31: ppo_config.remove_unused_columns is obsolete and has no effect: every column of a row reaches the reward pipeline"
    )
    assert f"{path}:19: global_epoches is read as global_epochs" in invocation.notes


@pytest.mark.parametrize(("name", "schema"), [("test_sft", GenerationTestConfig), ("test_reward", RewardTestConfig)])
def test_old_evaluation_configs_are_read(name: str, schema: type[Section], stage: Path) -> None:
    config: Any = invoke(schema, stage, old(name)).config
    assert config.data.max_prompt_length == 384 and config.wandb.project == "cqa"


def test_equal_minibatch_sizes_may_stand_together(stage: Path) -> None:
    config = invoke(
        PPORunConfig, stage, PPO.replace("reward_config", "  mini_batch_size: 4\n  forward_batch_size: 4\nreward_config")
    ).config
    assert config.ppo_config.mini_batch_size == 4


def test_overrides_take_old_and_obsolete_names(stage: Path) -> None:
    text = PPO.replace("reward_config", "  mini_batch_size: 4\nreward_config")
    arguments = ("ppo_config.forward_batch_size=8", "ppo_config.exp_name=x", "data_config={data_file_path: b, max_length_promt: 5}")
    invocation = invoke(PPORunConfig, stage, text, *arguments)
    assert invocation.config.ppo_config.mini_batch_size == 8  # an override replaces what the file says under the new name
    assert invocation.config.data_config.max_prompt_length == 5
    assert invocation.notes[:3] == (
        "override ppo_config.forward_batch_size: forward_batch_size is read as mini_batch_size",
        "override ppo_config.exp_name: ppo_config.exp_name is obsolete and has no effect: a run is named by desc",
        "override data_config: data_config.max_length_promt is read as max_prompt_length",
    )


def test_notes_are_printed(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invoke(SFTConfig, stage, old("sft")).print_notes()
    assert f"note: {stage / 'configs/c.yaml'}:7: data.truncate_promt is read as truncate_prompt\n" in capsys.readouterr().out


# --- keys of services --------------------------------------------------------------------------------------------------------------

CANARY = "c0ffee" * 6


def everything_of(invocation: Invocation[Any]) -> str:
    return repr((invocation.config, invocation.config.model_dump(), resolved_dict(invocation.config), invocation.notes, invocation.options))


@pytest.mark.parametrize("written", [CANARY, f"'{CANARY}'", "12345678901234567890", "1234e5678"])
def test_a_key_in_wandb_api_moves_into_the_environment(written: str, stage: Path) -> None:
    invocation = invoke(SFTConfig, stage, SFT + f"wandb: {{api: {written}}}\n")
    assert os.environ["WANDB_API_KEY"] == written.strip("'")
    assert invocation.config.wandb.api is None
    assert written.strip("'") not in everything_of(invocation)
    assert any(
        "wandb.api: a key belongs into the environment (WANDB_API_KEY); this one is moved there" in note for note in invocation.notes
    )


def test_a_key_in_the_environment_stays(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "theirs")
    invocation = invoke(SFTConfig, stage, SFT + f"wandb: {{api: {CANARY}}}\n")
    assert os.environ["WANDB_API_KEY"] == "theirs"
    assert CANARY not in everything_of(invocation)


@pytest.mark.parametrize(
    "place", ["api_key: {}", "wandb: {{api_key: {}}}", "WANDB_API_KEY: {}", "key: {}", "wandb: {{key: {}}}", "api: {}"]
)
def test_a_key_in_tracker_kwargs_moves_into_the_environment(place: str, stage: Path) -> None:
    text = PPO.replace("reward_config", f"  tracker_kwargs: {{{place.format(CANARY)}, name: n}}\nreward_config")
    invocation = invoke(PPORunConfig, stage, text)
    assert os.environ["WANDB_API_KEY"] == CANARY
    assert invocation.config.ppo_config.tracker_kwargs["name"] == "n"
    assert CANARY not in everything_of(invocation)


@pytest.mark.parametrize(
    "text",
    [
        "wandb: {key: KEY}",
        "wandb: {args: {api_key: KEY}}",
        "wandb: {api: [KEY]}",
        "api: KEY",
        "wandb: {api: KEY, api: KEY}",
        "wandb: KEY",
        "wandb: {args: KEY}",
    ],
)
def test_no_error_repeats_a_key(text: str, stage: Path) -> None:
    lines = problems(
        SFTConfig, stage, SFT + text.replace("KEY", CANARY) + "\n", f"wandb.api={CANARY}", f"ppo_config.tracker_kwargs.api_key={CANARY}"
    )
    assert len(lines) >= 2
    assert CANARY not in "".join(lines)
    assert "WANDB_API_KEY" not in os.environ


@pytest.mark.parametrize("name", ["settings", "dir", "config", "id", "resume"])
@pytest.mark.parametrize("place", ["{}: x", "wandb: {{{}: x}}"])
def test_arguments_of_wandb_that_a_run_sets_itself_are_refused(name: str, place: str, stage: Path) -> None:
    text = PPO.replace("reward_config", f"  tracker_kwargs: {{{place.format(name)}}}\nreward_config")
    where = f"tracker_kwargs.wandb.{name}" if "wandb" in place else f"tracker_kwargs.{name}"
    (line,) = problems(PPORunConfig, stage, text)
    assert line.endswith(f"ppo_config.{where}: set by the run itself; remove it")


@pytest.mark.parametrize("written", ["KEY", "{wandb: KEY}"])
def test_tracker_arguments_given_as_text_are_refused_unseen(written: str, stage: Path) -> None:
    text = PPO.replace("reward_config", f"  tracker_kwargs: {written.replace('KEY', CANARY)}\nreward_config")
    (line,) = problems(PPORunConfig, stage, text)
    assert "expected a mapping" in line and CANARY not in line


def test_resolved_dict_drops_secrets_and_keeps_tokens_of_text() -> None:
    kwargs = {"hf_token": CANARY, "nested": [{"password": CANARY, "name": "n"}], "Token": CANARY, "wandb": {"loginKey": CANARY}}
    config = PPORunConfig.model_validate(
        {
            "data_config": {"data_file_path": "a"},
            "ppo_config": {"model_name": "m", "tracker_kwargs": kwargs},
            "reward_config": {"reward_model_name": "r"},
            "generation_config": {"pad_token": "<pad>"},
        }
    )
    resolved = resolved_dict(config)
    assert CANARY not in repr(resolved)
    assert resolved["ppo_config"]["tracker_kwargs"] == {"nested": [{"name": "n"}], "wandb": {}}
    assert resolved["generation_config"]["pad_token"] == "<pad>"
    assert "api" not in resolved["wandb"]


def test_resolved_dict_is_plain_and_reads_back_to_the_same_config(stage: Path) -> None:
    text = SFT + "model_params: {lora: {target_modules: [q]}, lr_scheduler: cosine}\nevaluation: {generate_params: {num_beams: 2}}\n"
    config = invoke(SFTConfig, stage, text, "desc=abc", "trainer.params.strategy=ddp", "data.columns={Question: title}").config
    written = yaml.safe_dump(resolved_dict(config))
    assert "!!" not in written
    assert invoke(SFTConfig, stage, written).config == config


# --- trainer.params ----------------------------------------------------------------------------------------------------------------


def test_the_arguments_are_those_of_the_installed_trainer() -> None:
    import pytorch_lightning as pl

    signature = set(inspect.signature(pl.Trainer).parameters)
    assert set(ARGUMENTS) | STAGE_OWNED_ARGUMENTS == signature
    assert not set(ARGUMENTS) & STAGE_OWNED_ARGUMENTS


def test_every_precision_of_lightning_is_known() -> None:
    from typing import get_args

    from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT_INT, _PRECISION_INPUT_STR, _PRECISION_INPUT_STR_ALIAS

    for kind in (_PRECISION_INPUT_INT, _PRECISION_INPUT_STR, _PRECISION_INPUT_STR_ALIAS):
        for precision in get_args(kind):
            assert not lightning_argument_problems({"precision": precision, "accelerator": "gpu"}), precision


@pytest.mark.parametrize(
    "params",
    [
        {"accelerator": "auto", "precision": "16-mixed"},  # what there is decides when the run starts
        {"accelerator": "cpu", "precision": "bf16-mixed"},
        {"accelerator": "cpu", "precision": 32},
        {"devices": [0, 1], "strategy": "ddp_find_unused_parameters_true"},
        {"devices": "auto", "overfit_batches": 0, "limit_val_batches": 1.0},
        {"val_check_interval": 0.5, "max_time": {"hours": 1}, "deterministic": "warn", "fast_dev_run": 2},
        {"max_epochs": -1, "max_steps": 10, "gradient_clip_val": 1, "num_sanity_val_steps": -1, "profiler": "simple"},
    ],
)
def test_good_trainer_arguments_pass(params: dict[str, Any]) -> None:
    assert lightning_argument_problems(params) == {}


# --- cost --------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_config_is_refused_within_a_second_and_without_torch(stage: Path) -> None:
    path = write(stage, SFT + "sed: 1\n")
    code = (
        "import sys, time; start = time.process_time()\n"
        "from pathlib import Path\n"
        "from common.config import parse_command_line\nfrom common.errors import run_main\nfrom sft.config import SFTConfig\n"
        "def main(argv):\n"
        "    try: parse_command_line(SFTConfig, Path('.'), argv, description='')\n"
        "    finally:\n"
        "        heavy = [name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules]\n"
        "        print(time.process_time() - start, *heavy)\n"
        "run_main(main)"
    )
    result = subprocess.run([sys.executable, "-c", code, "--config", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: {path}:4: sed: unknown key; did you mean seed?\n"
    seconds, *modules = result.stdout.split()
    assert modules == []
    assert float(seconds) < 1  # of processor time: a shared machine may be slow
