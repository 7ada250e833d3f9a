"""Checkpoint directories: all or nothing, verified, loadable with plain transformers to equal numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from common.checkpoint import (
    MANIFEST,
    Manifest,
    atomic_directory,
    new_manifest,
    read_manifest,
    save_model_directory,
    tokenizer_fingerprint,
    verify_directory,
    vocabulary_fingerprint,
)
from common.errors import UserError
from common.models.fused import set_fused
from common.models.load import build_generator, load_generator, load_tokenizer, train_tokenizer
from common.schema import ModelInit
from common.score_transform import ScoreTransform

TEXTS = ["Question: What is the capital of France?\nAnswer: Paris.", "Question: Who asks?\nAnswer: Nobody asks."]
SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 270)


def build(model_type: str, tokenizer: Any, seed: int = 0) -> Any:
    return build_generator(ModelInit(model_type=model_type, config=SIZES[model_type]), tokenizer, 64, seed)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic directories


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "done") as staging:
        (staging / "file").write_text("x")
        assert not (tmp_path / "a" / "done").exists() and staging.parent == tmp_path / "a"
    assert leftovers(tmp_path / "a") == ["done"]
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a" / "broken") as staging:
        (staging / "file").write_text("x")
        raise RuntimeError
    assert leftovers(tmp_path / "a") == ["done"]


def test_existing_destinations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "link"):
        with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / name):
            raise AssertionError("never entered")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "late"):
        (tmp_path / "late").mkdir()  # somebody else was faster; an empty folder would be replaced by a rename
    assert leftovers(tmp_path) == ["empty", "late", "link"]


def test_kill_in_mid_save_leaves_no_destination(tmp_path: Path, root: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from common.checkpoint import atomic_directory
        with atomic_directory(Path(sys.argv[1]) / "step-000001") as staging:
            (staging / "manifest.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], cwd=root, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "step-000001").exists()


# --- manifests


def test_manifest_states_the_facts_and_reads_back(tmp_path: Path, tokenizer: Any) -> None:
    manifest = new_manifest(
        "reward_regression",
        tokenizer,
        max_length=64,
        readout={"name": "last_token"},
        score_transform=ScoreTransform(name="minmax", shift=1.0, scale=2.0),
        metrics={"val/loss": 0.5},
        config={"seed": 1},
        step=7,
    )
    (tmp_path / MANIFEST).write_text(manifest.model_dump_json())
    assert read_manifest(tmp_path) == manifest
    assert (manifest.pad_token_id, manifest.eos_token_id, manifest.is_reward_model) == (0, 1, True)
    assert manifest.packages["torch"] == torch.__version__ and "python" in manifest.packages
    assert manifest.host["cores"] == os.cpu_count() and manifest.host["torch_threads"] == torch.get_num_threads()
    assert read_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"stage": "sft"}', "tokenizer_fingerprint: Field required"),
        ('{"stage": "x", "tokenizer_fingerprint": ""}', "stage: "),
        ('{"stage": "sft", "tokenizer_fingerprint": "", "score_scale": NaN}', "score_scale: Input should be a finite number"),
        ('{"stage": "sft", "tokenizer_fingerprint": "", "score_scale": -1}', "score_scale: Input should be greater than or equal to 0"),
    ],
)
def test_damaged_manifest_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_newer_formats_are_refused_and_newer_keys_ignored(tmp_path: Path) -> None:
    facts = {"stage": "sft", "tokenizer_fingerprint": "", "colour": "green"}
    (tmp_path / MANIFEST).write_text(json.dumps(facts))
    assert isinstance(read_manifest(tmp_path), Manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(facts | {"format_version": 99}))
    with pytest.raises(UserError, match="format_version 99 is newer"):
        read_manifest(tmp_path)


def test_tokenizer_fingerprint_follows_the_rules_not_the_last_call(tmp_path: Path, tokenizer: Any) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == before
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 270)) == before
    assert tokenizer_fingerprint(train_tokenizer([*TEXTS, "aaa aaa aaa aaa"], 270)) != before


def test_vocabulary_fingerprint_ignores_an_added_padding_token() -> None:
    plain, padded = train_tokenizer(TEXTS, 270), train_tokenizer(TEXTS, 270)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(padded)
    assert vocabulary_fingerprint(plain) == vocabulary_fingerprint(padded)
    assert vocabulary_fingerprint(plain) != vocabulary_fingerprint(train_tokenizer([*TEXTS, "aaa aaa aaa aaa"], 270))


# --- model directories


@pytest.mark.parametrize("model_type", SIZES)
def test_saved_generators_load_with_plain_transformers_to_equal_numbers(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build(model_type, tokenizer)
    folder = save_model_directory(tmp_path / "m", model, tokenizer, new_manifest("sft", tokenizer))
    auto = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    plain = auto.from_pretrained(folder)
    ids = PreTrainedTokenizerFast.from_pretrained(folder)(TEXTS[0], return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer(TEXTS[0], return_tensors="pt").input_ids)
    if model_type != "qwen2":  # for which AutoTokenizer puts its own rules over those in the directory
        assert torch.equal(ids, AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt").input_ids)
    more = {"decoder_input_ids": ids[:, :4]} if model_type == "t5" else {}
    set_fused(model, False)  # transformers' own arithmetic, to compare bit for bit
    with torch.no_grad():
        assert torch.equal(plain(ids, **more).logits, model(ids, **more).logits)
    assert (plain.config.pad_token_id, plain.config.eos_token_id) == (0, 1)
    assert plain.generation_config.to_diff_dict().keys() <= {
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "transformers_version",
    }
    assert verify_directory(folder) == []
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix not in {".json", ".md"}) == [".safetensors"]


@pytest.mark.parametrize("model_type", SIZES)
def test_our_tokenizer_comes_back_beside_every_architecture(
    model_type: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(model_type, tokenizer)
    folder = save_model_directory(tmp_path / "m", model, tokenizer, new_manifest("sft", tokenizer))
    loaded = load_tokenizer(str(folder))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer) and len(loaded) == len(tokenizer)
    assert not caplog.records
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text().replace('"individual_digits": true', '"individual_digits": false'))
    load_tokenizer(str(folder))
    assert "its tokenizer is not the one its manifest records" in caplog.text


def test_model_card_says_how_to_load(tmp_path: Path, tokenizer: Any) -> None:
    manifest = new_manifest("sft", tokenizer, metrics={"val/loss": 1.25}, max_length=64)
    folder = save_model_directory(tmp_path / "m", build("gpt2", tokenizer), tokenizer, manifest)
    card = (folder / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card and "| val/loss | 1.25 |" in card


def test_extra_files_are_written_and_verified(tmp_path: Path, tokenizer: Any) -> None:
    def extra(staging: Path) -> None:
        (staging / "value_head.bin").write_bytes(b"1234")

    folder = save_model_directory(tmp_path / "m", build("gpt2", tokenizer), tokenizer, new_manifest("ppo", tokenizer), extra=extra)
    assert verify_directory(folder) == []
    (folder / "value_head.bin").write_bytes(b"1235")
    assert verify_directory(folder) == [f"{folder / 'value_head.bin'}: content differs from its checksum"]
    assert verify_directory(folder, checksums=False) == []
    (folder / "value_head.bin").write_bytes(b"12")
    assert verify_directory(folder, checksums=False) == [f"{folder / 'value_head.bin'}: 2 bytes, expected 4"]
    (folder / "value_head.bin").unlink()
    assert verify_directory(folder) == [f"{folder / 'value_head.bin'}: missing"]


def test_failure_while_saving_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    def extra(staging: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model_directory(tmp_path / "m", build("gpt2", tokenizer), tokenizer, new_manifest("sft", tokenizer), extra=extra)
    assert leftovers(tmp_path) == []


def test_where_padding_is_eos_the_config_names_no_padding(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.pad_token = tokenizer.eos_token
    model = build("llama", tokenizer)
    folder = save_model_directory(tmp_path / "m", model, tokenizer, new_manifest("sft", tokenizer))
    loaded = load_generator(str(folder))
    assert loaded.config.pad_token_id is None and loaded.generation_config.pad_token_id == 1
    assert loaded.get_input_embeddings().padding_idx is None


# --- what is loaded


class Canary:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_pickled_weights_load_without_running_code(tmp_path: Path, tokenizer: Any) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16))
    folder = tmp_path / "bin"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(load_generator(str(folder))(ids).logits, model.eval()(ids).logits)
    torch.save({**model.state_dict(), "extra": Canary(tmp_path / "sung")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than weights, and was not run"):
        load_generator(str(folder))
    assert not (tmp_path / "sung").exists()


def test_truncated_weights_are_one_line(tmp_path: Path, tokenizer: Any) -> None:
    folder = save_model_directory(tmp_path / "m", build("gpt2", tokenizer), tokenizer, new_manifest("sft", tokenizer))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="no model can be loaded from") as caught:
        load_generator(str(folder))
    assert "\n" not in str(caught.value)
