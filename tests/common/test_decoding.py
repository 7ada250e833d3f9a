"""Where answers end and how they are read: the same for every decode loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.decoding import check_positions, eos_ids, holds_stop, read_answers
from common.errors import UserError
from common.models.load import train_tokenizer
from common.sampling_options import sampling_option_problems
from common.schema import GenerateParams

STOPS = ["the sky", "ü", "\nQuestion:", "is it"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the capital of france is paris", "what is the colour of the sky? it is blue."], 320)


def test_a_stop_string_is_found_the_moment_it_stands_there_whatever_came_before(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    words = [
        "the",
        " sky",
        " the sk",
        "y",
        "ü",
        "f",
        "\n",
        "\nQuestion",
        ":",
        " is",
        " it",
        " blue",
        " capital of france",
        "<eos>",
        "<pad>",
    ]
    found = 0
    for _ in range(60):
        text = "".join(words[number] for number in torch.randint(len(words), (40,), generator=generator).tolist())
        ids = tokenizer(text, split_special_tokens=False)["input_ids"]
        for end in range(1, len(ids) + 1):
            whole = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            before = tokenizer.decode(ids[: end - 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if any(stop in before for stop in STOPS):
                break
            expected = any(stop in whole for stop in STOPS)
            assert holds_stop(tokenizer, torch.tensor([ids[:end]]), STOPS) == [expected], whole
            found += expected
    assert found > 40


def test_looking_for_a_stop_string_decodes_a_bounded_number_of_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = type(tokenizer).batch_decode

    def decode(self: Any, rows: Any, **options: Any) -> Any:
        sizes.extend(map(len, rows))
        return original(self, rows, **options)

    monkeypatch.setattr(type(tokenizer), "batch_decode", decode)
    assert holds_stop(tokenizer, torch.full((3, 5000), 60), ["abcd"]) == [False] * 3
    assert len(sizes) == 3 and max(sizes) <= 4 + 8


def test_special_tokens_inside_a_stop_string_do_not_hide_it(tokenizer: Any) -> None:
    first, second = (tokenizer(text)["input_ids"] for text in ("is", " it"))
    assert holds_stop(tokenizer, torch.tensor([[*first, *[tokenizer.pad_token_id] * 20, *second]]), ["is it"]) == [True]


def test_answers_are_read_up_to_the_first_stop_string(tokenizer: Any) -> None:
    ids = [tokenizer(text)["input_ids"] for text in (" blue.\nQuestion: the sky", " it is", "")]
    assert read_answers(tokenizer, [*ids, [*ids[1], tokenizer.eos_token_id]], STOPS) == [
        ("blue.", True), ("it is", False), ("", False), ("it is", False),
    ]  # fmt: skip


def test_ids_that_end_an_answer_are_the_options_or_else_the_tokenizers_and_the_models(tokenizer: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 1]))
    assert eos_ids(GenerateParams(), tokenizer, model) == [1, 7]
    assert eos_ids(GenerateParams.model_validate({"eos_token_id": 5}), tokenizer, model) == [5]
    assert eos_ids(GenerateParams.model_validate({"eos_token_id": [9, 5]}), tokenizer, model) == [5, 9]
    with pytest.raises(UserError, match="no token ends an answer"):
        eos_ids(GenerateParams(), SimpleNamespace(eos_token_id=None), SimpleNamespace())


def test_positions_count_prompt_and_answer_together_or_for_each_side_alone() -> None:
    causal = SimpleNamespace(max_position_embeddings=10, is_encoder_decoder=False)
    check_positions(causal, 6, 4)
    with pytest.raises(UserError, match="prompt and answer of 11 tokens, the model has 10 positions"):
        check_positions(causal, 7, 4)
    both = SimpleNamespace(max_position_embeddings=10, is_encoder_decoder=True)
    check_positions(both, 10, 10)
    with pytest.raises(UserError, match="an answer of 11 tokens"):
        check_positions(both, 10, 11)
    check_positions(SimpleNamespace(is_encoder_decoder=True), 10**6, 10**6)


@pytest.mark.parametrize("name", ["typical_p", "epsilon_cutoff", "eta_cutoff", "min_p", "top_h"])
def test_options_that_leave_nothing_out_are_refused(name: str) -> None:
    def problems(value: Any) -> list[str]:
        return sampling_option_problems(GenerateParams.model_validate({name: value}), "section")

    assert problems(None) == problems(0.5) == []
    for value in (0, 1.5, -0.1, True, "0.5"):
        assert len(problems(value)) == 1 and problems(value)[0].startswith(f"section.{name}: got {value!r}, expected a number above 0")
    assert bool(problems(1.0)) == (name not in ("min_p", "top_h"))  # a token that is half as likely may fall short of these


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_strings"):
        GenerateParams(stop_strings=["a", ""])
