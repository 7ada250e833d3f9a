"""Code that comes with a model is not imported, nor are templates and YAML tags more than text, unless the user says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from common.checkpoint import read_manifest
from common.config import parse_command_line
from common.errors import UserError
from common.models.load import load_backbone, load_generator, load_tokenizer
from common.models.reward import RewardScorer
from common.prompts import render_prompt
from common.record_types import Prompt
from reward_model.compare_readouts import main as compare_readouts
from reward_model.score import main as score
from rlhf.ppo.models import AutoModelForCausalLMWithValueHead
from rlhf.train_ppo import main as train_ppo
from sft.ask import main as ask
from sft.config import SFTConfig
from sft.train_sft import main as train_sft
from tests.security.conftest import Canary, Problem, change_json

CLASSES = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
ROW = {"Question": "Is it?", "Answer": "It is."}


def an_unknown_architecture(folder: Path) -> None:
    change_json(folder / "config.json", model_type="evil", auto_map=CLASSES)


def classes_for_a_known_architecture(folder: Path) -> None:
    change_json(folder / "config.json", auto_map=CLASSES)


def a_tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


def a_kernel(folder: Path) -> None:
    """transformers would fetch `owner/name` from the hub and run it."""
    change_json(folder / "config.json", attn_implementation="somebody/kernel")


def a_kernel_deep_inside(folder: Path) -> None:
    change_json(folder / "config.json", text_config={"_experts_implementation": "flash|somebody/kernel"})


CARRIERS = [an_unknown_architecture, classes_for_a_known_architecture, a_tokenizer, a_kernel, a_kernel_deep_inside]


@pytest.mark.parametrize("put", CARRIERS)
def test_a_directory_with_code_of_its_own(
    put: Callable[[Path], None], generator: Path, reward: Path, canary: Canary, problem: Problem
) -> None:
    for folder in (generator, reward):
        put(folder)
        (folder / "evil.py").write_text(canary.code)
    model, judge = str(generator), str(reward)
    loads: list[Callable[[], object]] = [
        lambda: load_tokenizer(model),
        lambda: load_generator(model),
        lambda: load_backbone(model),
        lambda: AutoModelForCausalLMWithValueHead.from_pretrained(model),
        lambda: RewardScorer(judge),
        lambda: ask([model, "Is it?"]),
        lambda: score([judge, "data.json"]),
    ]
    for load in loads:
        line = problem(load)
        assert "brings code of its own (" in line and line.endswith("set trust_remote_code: true if you have read and trust it")


@pytest.mark.parametrize("put", [an_unknown_architecture, a_tokenizer])
def test_code_in_a_model_named_by_a_config(
    put: Callable[[Path], None], generator: Path, reward: Path, tmp_path: Path, canary: Canary, problem: Problem
) -> None:
    """Refused before torch loads anything: policy, judge, and what a run starts from."""
    (tmp_path / "data.json").write_text(json.dumps({"train": [ROW], "val": [ROW]}))
    whole = generator.rename(tmp_path / "whole")
    put(reward)
    (reward / "evil.py").write_text(canary.code)
    ppo = {"data_config": {"data_file_path": str(tmp_path / "data.json")}, "reward_config": {"reward_model_name": str(reward)}}
    sft = {"data": {"data_dir": str(tmp_path / "data.json")}, "model_name": str(reward)}
    for main, settings, setting in (
        (train_ppo, {**ppo, "ppo_config": {"model_name": str(whole), "batch_size": 1}}, "reward_config.reward_model_name"),
        (train_sft, sft, "model_name"),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        line = problem(lambda main=main: main(["--config", str(tmp_path / "config.yaml")]))  # type: ignore[misc]
        assert line.startswith(f"{setting}: {reward} brings code of its own (auto_map in ")


def test_code_runs_where_the_user_trusts_it(generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusals are about code that would run: with trust it does."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    appeared = Canary(tmp_path / "appeared")
    change_json(generator / "config.json", auto_map={"AutoConfig": "trusted.Config"}, model_type="trusted")
    (generator / "trusted.py").write_text(
        f"{appeared.code}from transformers import GPTNeoConfig\nclass Config(GPTNeoConfig):\n    model_type = 'trusted'\n"
    )
    with pytest.raises(UserError, match="no model can be loaded"):  # a configuration alone makes no model
        load_generator(str(generator), trust_remote_code=True)
    assert appeared.path.exists()


def test_a_model_s_own_way_of_generating_is_not_used(generator: Path, canary: Canary) -> None:
    folder = generator / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(f"{canary.code}def generate(model, **arguments): return None\n")
    model = load_generator(str(generator))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("prefix", ["https://example.org/", "http://127.0.0.1/", "s3://bucket/", "file:///", "hf://"])
@pytest.mark.parametrize("setting", ["model_name", "trainer.ckpt_path"])
def test_a_url_as_a_model(setting: str, prefix: str, tmp_path: Path, problem: Problem) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"train": [ROW], "val": [ROW]}))
    (tmp_path / "config.yaml").write_text(f"data: {{data_dir: {tmp_path / 'data.json'}}}\nmodel_name: x\n")
    url = f"{prefix}model.bin"
    overrides = [f"{setting}={url}"] + (["model_name=null", "model_init={}"] if setting != "model_name" else [])
    line = problem(lambda: train_sft(["--config", str(tmp_path / "config.yaml"), *overrides]))
    assert line.startswith(f"{setting}: '{url}' is a URL; give a model directory or a hub name")
    assert f"'{url}' is a URL" in problem(lambda: ask([url]))


# --- templates ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.makedirs('CANARY') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ (messages | attr('append'))(1) }}",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ nothing.at.all }}",
        "{% broken",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template: str, generator: Path, canary: Canary, problem: Problem) -> None:
    (generator / "chat_template.jinja").write_text(template.replace("CANARY", str(canary.path)))
    tokenizer = load_tokenizer(str(generator))
    line = problem(lambda: render_prompt(Prompt("Is it?"), "chat", tokenizer))
    assert line.startswith("prompt_format: the chat template of the model's tokenizer cannot be rendered: ")


# --- YAML -----------------------------------------------------------------------------------------------------------------------------

TAGS = [
    "TAG",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:os.system {}",
    "!!python/tuple [1]",
    "!evil x",
    "!!binary aGk=",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_a_config_a_group_and_an_override(tag: str, tmp_path: Path, canary: Canary) -> None:
    tag = tag.replace("TAG", canary.tag)
    plain = "data: {data_dir: d.json}\nmodel_name: m\n"
    group = tmp_path / "configs" / "readout"
    group.mkdir(parents=True)
    (group / "evil.yaml").write_text(f"seed: {tag}\n")
    config = tmp_path / "configs" / "c.yaml"
    for text, more in ((f"{plain}seed: {tag}\n", []), (plain, ["readout=evil"]), (plain, [f"seed={tag}"])):
        config.write_text(text)
        with pytest.raises(UserError, match=r"seed: got the tag !.*, expected plain values without tags"):
            parse_command_line(SFTConfig, tmp_path, ["--config", str(config), *more], description="")


def test_tags_in_the_config_of_a_comparison_that_goes_on(tmp_path: Path, canary: Canary) -> None:
    rows = [{"Question": f"Is it {number}?", "Accepted_Answer": "It is.", "Answer": "No."} for number in range(3)]
    (tmp_path / "data.json").write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    settings = {"objective": "pairs", "data": {"data_dir": str(tmp_path / "data.json")}, "model_init": {"vocab_size": 270}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "config.yaml").write_text(f"seed: {canary.tag}\n")
    with pytest.raises(UserError, match=r"earlier/config\.yaml:1: seed: got the tag !!python/object/apply:os\.mkdir"):
        compare_readouts(["--config", str(tmp_path / "config.yaml"), "--resume", str(earlier)])


def test_tags_in_a_manifest_and_in_a_data_set_s_card(
    generator: Path, tmp_path: Path, canary: Canary, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.records import read_splits

    (generator / "manifest.json").write_text(f"stage: {canary.tag}\n")
    assert problem(lambda: read_manifest(generator)).endswith("the directory is damaged")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps([ROW]))
    (folder / "README.md").write_text(f"---\nconfigs: {canary.tag}\n---\n")
    assert "could not determine a constructor" in problem(lambda: read_splits(f"hf:{folder}", "sft"))
