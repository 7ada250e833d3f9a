"""Checks of a model before torch is imported: each mistake is one line that names the setting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import MANIFEST, Manifest
from common.errors import UserError
from common.model_source import check_joinable, check_length, check_model_source, check_prompt_format, check_same_vocabulary


def write_model(folder: Path, *, manifest: dict[str, Any] | None = None, **config: Any) -> Path:
    """The files of a model directory, with weights that nobody reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neo", "max_position_embeddings": 64, "vocab_size": 4} | config))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2}]}))
    if manifest is not None:
        (folder / MANIFEST).write_text(Manifest(**({"stage": "sft", "tokenizer_fingerprint": "x"} | manifest)).model_dump_json())
    return folder


def write_reward_model(folder: Path, **manifest: Any) -> Path:
    facts = {"stage": "reward_regression", "readout": {"name": "last_token"}} | manifest
    return write_model(folder, manifest=facts, architectures=["GPTNeoForSequenceClassification"])


def problem(name: Path | str, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_model_source(str(name), **arguments)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def test_a_whole_directory_is_described(tmp_path: Path) -> None:
    source = check_model_source(str(write_model(tmp_path / "m", manifest={"prompt_format": "chat"})))
    assert (source.positions, source.prompt_format, source.is_reward_model, source.is_encoder_decoder) == (64, "chat", False, False)


def test_prompt_and_answer_part_ways_in_encoder_decoders_but_for_readouts_of_both_in_one(tmp_path: Path) -> None:
    facts = {"model_type": "t5", "is_encoder_decoder": True}
    for name, splits in (("last_token", True), ("decoder_output", False)):
        manifest = {"stage": "reward_regression", "readout": {"name": name}}
        assert check_model_source(str(write_model(tmp_path / name, manifest=manifest, **facts)), role="reward").splits_text is splits
    assert check_model_source(str(write_model(tmp_path / "sft", manifest={}, **facts))).splits_text
    assert not check_model_source(str(write_reward_model(tmp_path / "causal")), role="reward").splits_text


def test_missing_directory_and_dangling_latest(tmp_path: Path) -> None:
    assert problem(tmp_path / "no") == f"model_name: no model directory {tmp_path / 'no'}"
    assert problem(tmp_path / "latest").endswith("run the stage that writes it first")
    (tmp_path / "link").symlink_to("gone/best")
    assert problem(tmp_path / "link") == f"model_name: {tmp_path / 'link'} points to gone/best, which does not exist"


def test_an_ensemble_of_no_number_is_left_to_loading(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    facts = {"stage": "reward_classification", "tokenizer_fingerprint": "", "readout": {"name": "last_token", "ensemble": "two"}}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(facts))
    assert check_model_source(str(tmp_path / "m"), role="reward").readouts == 1


def test_file_and_url_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_text("")
    assert "is a file, expected a model directory" in problem(tmp_path / "f.bin", setting="trainer.ckpt_path")
    assert problem("https://example.org/model.bin", setting="trainer.ckpt_path").startswith("trainer.ckpt_path: 'https://example.org")


def test_run_directory_instead_of_its_best(tmp_path: Path) -> None:
    run = tmp_path / "desc-run,index-0"
    write_model(run / "checkpoints" / "step-000010")
    (run / "best").symlink_to("checkpoints/step-000010")
    assert problem(run).endswith(f"so it is no model directory; did you mean {run / 'best'}?")


def test_run_without_checkpoint_bare_adapter_and_empty_directory(tmp_path: Path) -> None:
    assert problem(tmp_path).endswith("has no config.json, so it is no model directory")
    (tmp_path / "config.yaml").write_text("")
    assert problem(tmp_path).endswith("it is a run that has saved no checkpoint yet")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert problem(tmp_path).endswith("merge it into its base model first")


def test_unfinished_directories(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    assert problem(folder).endswith("holds no tokenizer")
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors)" in problem(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert problem(folder).endswith("holds no tokenizer")  # a pickle of weights is accepted; torch reads it with weights_only
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in problem(folder)


def test_files_of_the_manifest_must_be_there(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", manifest={"files": {"value_head.safetensors": {"size": 1, "sha256": ""}}})
    assert problem(folder).endswith("lacks value_head.safetensors, which its manifest lists")


def test_vocabulary_larger_than_the_embeddings(tmp_path: Path) -> None:
    write_model(tmp_path / "fits", vocab_size=3)
    check_model_source(str(tmp_path / "fits"))
    assert "its tokenizer has 3 entries, its model embeddings for 2" in problem(write_model(tmp_path / "m", vocab_size=2))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_directory_needs_trust(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path / "m")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | {"auto_map": {"AutoConfig": "evil.Config"}}))
    assert f"brings code of its own (auto_map in {file}); set trust_remote_code: true" in problem(folder)
    check_model_source(str(folder), trust_remote_code=True)


def test_hub_names_offline_and_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not in the local cache while HF_HUB_OFFLINE forbids" in problem("some-org/some-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr("common.model_source._check_hub_reachable", lambda name, setting: None)
    assert check_model_source("some-org/some-model").config is None
    assert "no model directory a/b/c" in problem("a/b/c")


def test_cached_hub_model_is_described_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    write_model(snapshot, max_position_embeddings=99)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert check_model_source("org/name").positions == 99


def test_reward_model_as_policy_and_policy_as_judge(tmp_path: Path) -> None:
    judge, policy = write_reward_model(tmp_path / "judge"), write_model(tmp_path / "policy", manifest={})
    assert "is a reward model; expected a model that writes text" in problem(judge, setting="ppo_config.model_name")
    line = problem(policy, setting="reward_config.reward_model_name", role="reward")
    assert line == (
        f"reward_config.reward_model_name: {policy} has no reward head (its manifest says stage sft); "
        "expected the output of a train_reward.py"
    )
    check_model_source(str(judge), role="reward")
    check_model_source(str(judge), role="backbone")
    check_model_source(str(policy), role="backbone")


def test_lengths_beyond_positions(tmp_path: Path) -> None:
    source = check_model_source(str(write_model(tmp_path / "m")))
    check_length(source, 64, "data.max_length 64")
    with pytest.raises(UserError, match=r"data\.max_length 65 exceeds the 64 positions of model_name .*as many positions"):
        check_length(source, 65, "data.max_length 65")
    gpt2 = check_model_source(str(write_model(tmp_path / "gpt2", max_position_embeddings=None, n_positions=32)))
    t5 = check_model_source(str(write_model(tmp_path / "t5", model_type="t5", n_positions=32)))
    assert (gpt2.positions, t5.positions) == (32, None)


def test_prompt_formats_must_agree(tmp_path: Path) -> None:
    policy = check_model_source(str(write_model(tmp_path / "policy", manifest={"prompt_format": "qa"})))
    judge = check_model_source(str(write_reward_model(tmp_path / "judge", prompt_format="chat")), setting="judge", role="reward")
    foreign = check_model_source(str(write_model(tmp_path / "foreign")))
    assert check_joinable(policy, []) == "qa"
    assert check_joinable(foreign, [judge], prompt_format="chat") == "chat"
    with pytest.raises(UserError) as caught:
        check_joinable(policy, [judge])
    assert caught.value.problems == (f"judge: {judge.name} was trained on prompt format chat, but model_name {policy.name} uses qa",)
    with pytest.raises(UserError, match=r"prompt_format chat does not fit model_name .*, which was trained on qa"):
        check_joinable(policy, [], prompt_format="chat")
    with pytest.raises(UserError, match=r"data\.prompt_format chat does not fit model_name"):
        check_prompt_format(policy, "chat", "data.prompt_format")
    check_prompt_format(foreign, "chat", "data.prompt_format")


def test_a_critic_shares_the_policy_s_vocabulary(tmp_path: Path) -> None:
    policy = check_model_source(str(write_model(tmp_path / "policy", manifest={"vocabulary_fingerprint": "a"})), setting="policy")
    same, other = (
        check_model_source(str(write_reward_model(tmp_path / name, vocabulary_fingerprint=name)), setting="judge", role="reward")
        for name in ("a", "b")
    )
    check_same_vocabulary(policy, same)
    with pytest.raises(UserError, match=r"judge: .* has another vocabulary than policy .*; use ppo_config.critic: head"):
        check_same_vocabulary(policy, other)
    foreign = check_model_source(str(write_model(tmp_path / "foreign", vocab_size=9)))
    with pytest.raises(UserError, match="has another vocabulary"):
        check_same_vocabulary(foreign, policy)


def test_checks_import_no_torch(root: Path) -> None:
    code = "import sys, common.model_source, common.checkpoint; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_an_unreachable_hub_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "all_proxy", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match=r"model_name: 'nobody/nothing' is no directory .* HF_HUB_OFFLINE=1") as error:
        check_model_source("nobody/nothing")
    assert len(error.value.problems) == 1
