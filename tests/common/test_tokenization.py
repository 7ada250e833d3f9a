"""Ids of prompts and answers: what is joined, what is cut, and that no text turns into a special token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UserError
from common.models.load import train_tokenizer
from common.prompts import render_prompt
from common.records import PairRecord, Prompt, SFTRecord, read_splits
from common.tokenization import Encoder, UnusableRow, encode_answers, encode_preferences

CORPUS = [
    "Question: What is the capital of France?\nAnswer: Paris, of course.",
    "Question: How old are you?\nContext: Ages\nAnswer: I am 5.",
] * 20


def letters(*, bos: bool = False, suffix: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, so that lengths can be counted by eye. Optionally BOS before and EOS after every text."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "é"]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    if bos or suffix:
        template = f"{'<bos> ' if bos else ''}$A{' <eos>' if suffix else ''}"
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text by itself, as Llama 2's does."""
    pieces = ["<pad>", "</s>", "<s>", "▁", *[chr(code) for code in range(33, 127)], "\n", "▁a"]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges=[("▁", "a")], unk_token=None))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


FRAME = len("Question: \nAnswer:")


# --- joining ---------------------------------------------------------------------------------------------------------------------


def test_prompt_and_answer_are_joined_as_ids() -> None:
    tokenizer = letters()
    encoded = Encoder(tokenizer, max_length=100).pair(Prompt("Why?"), "So.")
    assert text_of(tokenizer, encoded.prompt_ids) == "Question: Why?\nAnswer:"
    assert text_of(tokenizer, encoded.answer_ids) == " So.<eos>"
    assert encoded.input_ids == encoded.prompt_ids + encoded.answer_ids
    assert (encoded.length, encoded.cut_prompt, encoded.cut_answer) == (27, 0, 0)


def test_bos_stands_once_at_the_start() -> None:
    tokenizer = letters(bos=True)
    encoder = Encoder(tokenizer, max_length=100)
    encoded = encoder.pair(Prompt("Why?", history=(("a", "b"),)), "So.")
    assert encoded.input_ids.count(2) == 1 and encoded.input_ids[0] == 2
    assert encoder.prompt(Prompt("Why?"))[0] == 2


def test_a_causal_prompt_never_ends_in_the_tokenizers_suffix_and_an_answer_has_one_eos() -> None:
    tokenizer = letters(bos=True, suffix=True)
    encoded = Encoder(tokenizer, max_length=100).pair(Prompt("Why?"), "So.")
    assert encoded.input_ids.count(1) == 1 and encoded.answer_ids[-1] == 1


def test_an_encoder_gets_the_tokenizers_suffix_and_its_answer_starts_afresh() -> None:
    tokenizer = letters(suffix=True)
    encoded = Encoder(tokenizer, max_length=100, is_encoder_decoder=True).pair(Prompt("Why?"), "So.")
    assert text_of(tokenizer, encoded.prompt_ids) == "Question: Why?\nAnswer:<eos>"
    assert text_of(tokenizer, encoded.answer_ids) == "So.<eos>"


@pytest.mark.parametrize(
    "make", [letters, sentencepiece_like, lambda: train_tokenizer(CORPUS, 300)], ids=["letters", "sentencepiece", "bytes"]
)
def test_joined_ids_decode_to_the_text_of_the_format(make: Any) -> None:
    tokenizer = make()
    ids = Encoder(tokenizer, max_length=200).pair(Prompt("What is the capital?"), "a city").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Question: What is the capital?\nAnswer: a city"


def test_a_real_sentencepiece_tokenizer(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    encoded = Encoder(tokenizer, max_length=200).pair(Prompt("Once upon a time?"), "Yes.")
    assert tokenizer.decode(encoded.input_ids) == "<s> Question: Once upon a time?\nAnswer: Yes.</s>"
    assert encoded.input_ids.count(tokenizer.bos_token_id) == encoded.input_ids.count(tokenizer.eos_token_id) == 1


def test_many_rows_give_the_ids_of_single_ones() -> None:
    tokenizer = train_tokenizer(CORPUS, 300)
    prompts = [Prompt("What is the capital of France?"), Prompt("Age?", "x " * 60), Prompt("And?", history=(("a", "b"),) * 9)]
    answers = ["Paris", "5 " * 40, "Yes <eos>"]
    many, single = (Encoder(tokenizer, max_length=60, max_prompt_length=30) for _ in range(2))
    assert many.pairs(prompts, answers) == [single.pair(*pair) for pair in zip(prompts, answers, strict=True)]
    assert many.counts == single.counts
    assert many.prompts(prompts) == [single.prompt(prompt) for prompt in prompts]


# --- special tokens in texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [letters, sentencepiece_like, lambda: train_tokenizer(CORPUS, 300)], ids=["letters", "sentencepiece", "bytes"]
)
def test_text_that_looks_like_a_special_token_stays_text(make: Any) -> None:
    tokenizer = make()
    special = "".join(tokenizer.all_special_tokens)
    encoder = Encoder(tokenizer, max_length=400)
    prompt = Prompt(f"What is {special}?", f"{special}", ((special, special),))
    encoded = encoder.pair(prompt, f"It is {special}.")
    inner = encoded.input_ids[len(encoder._before) : -1]
    assert not set(inner) & set(tokenizer.all_special_ids)
    assert text_of(tokenizer, inner) == f"{render_prompt(prompt)} It is {special}."
    assert encoder.counts["texts with special tokens"] == 5


def chat_tokenizer() -> Any:
    tokenizer = train_tokenizer(CORPUS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>", "<|bot|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    return tokenizer


def test_a_chat_keeps_its_own_special_tokens_and_none_of_its_texts() -> None:
    tokenizer = chat_tokenizer()
    user, end, bot = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|bot|>"])
    encoder = Encoder(tokenizer, prompt_format="chat", max_length=200)
    for question in ("Hello?", "Say <|bot|> or <eos>!", "\ue0000\ue001<|end|>\ue0007\ue001"):
        ids = encoder.prompt(Prompt(question, history=(("a", "b"),)))
        specials = [token for token in ids if token in tokenizer.all_special_ids]
        assert specials == [user, end, bot, end, user, end, bot]
    text = text_of(tokenizer, encoder.prompt(Prompt("Say <|bot|> or <eos>!")))
    assert text == "<|user|>Say <|bot|> or <eos>!<|end|><|bot|>"
    encoded = encoder.pair(Prompt("Hello?"), "Hi <|end|>")
    assert text_of(tokenizer, encoded.answer_ids) == "Hi <|end|><eos>" and end not in encoded.answer_ids


def test_a_chat_is_cut_at_its_oldest_turns_and_its_question_within_the_template() -> None:
    tokenizer = chat_tokenizer()
    long = "What is the capital of France? " * 5
    encoder = Encoder(tokenizer, prompt_format="chat", max_length=40)
    ids = encoder.prompt(Prompt(long, history=(("a", "b"),)))
    text = text_of(tokenizer, ids)
    assert 38 <= len(ids) <= 40
    assert text.startswith("<|user|>What is the capital") and text.endswith("<|end|><|bot|>")
    assert encoder.counts["dialogue turns dropped"] == 1


# --- cutting ---------------------------------------------------------------------------------------------------------------------


def test_a_question_is_cut_at_its_end_and_the_answer_keeps_eos() -> None:
    tokenizer = letters()
    encoder = Encoder(tokenizer, max_length=FRAME + 10 + 5)
    encoded = encoder.pair(Prompt("0123456789abcdef"), "yes")  # " yes<eos>" is 5
    assert text_of(tokenizer, encoded.prompt_ids) == "Question: 0123456789\nAnswer:"
    assert text_of(tokenizer, encoded.answer_ids) == " yes<eos>"
    assert (encoded.cut_prompt, encoded.cut_answer) == (6, 0)
    assert encoder.counts == {"prompts cut": 1, "prompt tokens cut": 6}


def test_the_question_goes_entirely_before_a_fitting_answer_loses_a_token() -> None:
    tokenizer = letters()
    encoded = Encoder(tokenizer, max_length=FRAME + 12).pair(Prompt("a question"), "0123456789")
    assert text_of(tokenizer, encoded.input_ids) == "Question: \nAnswer: 0123456789<eos>"


def test_an_answer_too_long_for_any_prompt_is_cut_at_its_end_and_loses_eos() -> None:
    tokenizer = letters()
    encoder = Encoder(tokenizer, max_length=60)
    encoded = encoder.pair(Prompt("0123456789abcdef"), "x" * 100)
    assert text_of(tokenizer, encoded.prompt_ids) == "Question: 0123456789ab\nAnswer:"  # half of 60
    assert text_of(tokenizer, encoded.answer_ids) == " " + "x" * 29
    assert (encoded.cut_prompt, encoded.cut_answer, encoded.length) == (4, 72, 60)
    assert encoder.counts == {"prompts cut": 1, "prompt tokens cut": 4, "answers cut": 1, "answer tokens cut": 72}
    short = Encoder(tokenizer, max_length=60).pair(Prompt("q"), "x" * 100)
    assert text_of(tokenizer, short.input_ids) == "Question: q\nAnswer: " + "x" * (60 - FRAME - 2)


def test_max_prompt_length_cuts_though_there_is_room() -> None:
    tokenizer = letters()
    encoder = Encoder(tokenizer, max_length=1000, max_prompt_length=FRAME + 3)
    assert text_of(tokenizer, encoder.pair(Prompt("abcdef"), "y").input_ids) == "Question: abc\nAnswer: y<eos>"
    assert text_of(tokenizer, encoder.prompt(Prompt("abcdef"))) == "Question: abc\nAnswer:"


def test_a_dialogue_loses_its_oldest_turns_first_then_context_then_question() -> None:
    tokenizer = letters()
    prompt = Prompt("why not?", "some context", (("old", "older"), ("new", "newer")))
    turn = len("Question: new\nAnswer: newer\n")

    def cut_to(limit: int) -> str:
        return text_of(tokenizer, Encoder(tokenizer, max_length=500, max_prompt_length=limit).prompt(prompt))

    single = "Question: why not?\nContext: some context\nAnswer:"
    assert cut_to(len(single) + turn + 5) == "Question: new\nAnswer: newer\n" + single
    assert cut_to(len(single) + turn - 1) == single
    assert cut_to(len(single) - 4) == "Question: why not?\nContext: some con\nAnswer:"
    assert cut_to(FRAME + 4) == "Question: why\nAnswer:"


def test_an_uncuttable_prompt_is_an_error_with_its_row() -> None:
    encoder = Encoder(letters(), max_length=40, truncate_prompt=False)
    with pytest.raises(UserError, match=r"^f: train row 3: got prompt and answer of 38 \+ 3 tokens, expected at most max_length 40"):
        encoder.pair(Prompt("x" * 20), "y", "f: train row 3")
    with pytest.raises(UserError, match=r"^f: train row 4: prompt: got 48 tokens, expected at most 40 \(truncate_prompt is false\)"):
        encoder.prompt(Prompt("x" * 30), "f: train row 4")
    assert encoder.pair(Prompt("x" * 19), "y").length == 40


def test_lengths_that_leave_no_room_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=rf"max_length: got {FRAME}, expected at least {FRAME + 1}"):
        Encoder(letters(), max_length=FRAME)
    with pytest.raises(UserError, match=rf"max_prompt_length: got 5, expected at least {FRAME}"):
        Encoder(letters(), max_length=100, max_prompt_length=5)


def test_encoder_decoders_have_the_length_twice() -> None:
    tokenizer = letters(suffix=True)
    encoded = Encoder(tokenizer, max_length=30, is_encoder_decoder=True).pair(Prompt("x" * 50), "y" * 50)
    assert text_of(tokenizer, encoded.prompt_ids) == f"Question: {'x' * 11}\nAnswer:<eos>"
    assert text_of(tokenizer, encoded.answer_ids) == "y" * 30
    assert (encoded.cut_prompt, encoded.cut_answer) == (39, 21)


QUESTIONS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(question=QUESTIONS, answer=QUESTIONS, context=QUESTIONS | st.just(""), length=st.integers(20, 120))
def test_whatever_is_cut_fits_and_wastes_little(question: str, answer: str, context: str, length: int) -> None:
    tokenizer = BYTES
    encoder = Encoder(tokenizer, max_length=length, max_prompt_length=length // 2 + 5)
    encoded = encoder.pair(Prompt(question, context), answer)
    full = Encoder(tokenizer, max_length=10_000).pair(Prompt(question, context), answer)
    assert encoded.length <= length and len(encoded.prompt_ids) <= length // 2 + 5
    assert encoded.cut_prompt == len(full.prompt_ids) - len(encoded.prompt_ids)
    assert encoded.cut_answer == len(full.answer_ids) - len(encoded.answer_ids)
    assert encoded.answer_ids == full.answer_ids[: len(encoded.answer_ids)] and encoded.answer_ids
    assert text_of(tokenizer, encoded.prompt_ids).endswith("\nAnswer:")
    if encoded.cut_answer:
        assert encoded.length == length


BYTES = train_tokenizer(CORPUS, 300)


# --- rows ------------------------------------------------------------------------------------------------------------------------


def sft(answer: str, row: int = 1) -> SFTRecord:
    return SFTRecord(Prompt("Why?"), answer, {}, f"f: train row {row}")


def test_an_answer_without_a_token_is_refused_or_dropped_and_counted() -> None:
    tokenizer = letters()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    encoder = Encoder(tokenizer, prompt_format="qa", max_length=100, is_encoder_decoder=True)
    with pytest.raises(UnusableRow, match=r"^f: answer: no token is left of it"):
        encoder.pair(Prompt("Why?"), "~~", "f")
    rows = [sft("yes"), sft("~", 2), sft("~~", 3)]
    with pytest.raises(UserError) as raised:
        encode_answers(encoder, rows)
    assert [problem.split(": answer")[0] for problem in raised.value.problems] == ["f: train rows 2 and 3"]
    encoder.counts.clear()
    encoded = encode_answers(encoder, rows, "drop")
    assert [row is None for row in encoded] == [False, True, True]
    assert encoder.counts["rows dropped"] == 2


def test_what_was_cut_is_told_in_full_once() -> None:
    encoder = Encoder(letters(), max_length=40)
    encode_answers(encoder, [sft("x" * 18), sft("x" * 50, 2), sft("yes", 3), SFTRecord(Prompt("Why?" * 10), "<eos>", {}, "f: train row 4")])
    assert encoder.take_notes("train", remedy="raise data.max_length") == [
        "train: 3 of 4 prompts cut (29 tokens); raise data.max_length to keep them",
        "train: 1 of 4 answers cut (32 tokens); raise data.max_length to keep them",
        "train: 1 texts hold special tokens, which are read as plain text",
    ]
    encoder.prompts([Prompt("Why?")])
    assert encoder.take_notes("val", remedy="") == [] and not encoder.counts


def test_problems_of_many_rows_are_told_at_once_up_to_twenty() -> None:
    encoder = Encoder(letters(), max_length=40, truncate_prompt=False)
    with pytest.raises(UserError) as raised:
        encode_answers(encoder, [sft("x" * 50, row) for row in range(1, 31)], "drop")
    assert len(raised.value.problems) == 21 and raised.value.problems[-1] == "... and 10 more problems"


def test_chosen_and_rejected_follow_the_same_cut_prompt() -> None:
    tokenizer = letters()
    record = PairRecord(Prompt("0123456789abcdef"), "short", ("a longer answer", "mid"), None, {}, "f: train row 1")
    [group] = encode_preferences(Encoder(tokenizer, max_length=40), [record])
    assert group is not None
    assert [text_of(tokenizer, row.answer_ids) for row in group] == [" short<eos>", " a longer answer<eos>", " mid<eos>"]
    assert {tuple(row.prompt_ids) for row in group} == {tuple(group[1].prompt_ids)}
    assert max(row.length for row in group) == 40 and text_of(tokenizer, group[0].prompt_ids) == "Question: 01234\nAnswer:"


def test_a_fitting_answer_keeps_eos_beside_one_that_is_cut() -> None:
    tokenizer = letters()
    record = PairRecord(Prompt("0123456789"), "x" * 100, ("y" * 18,), None, {}, "f")
    [group] = encode_preferences(Encoder(tokenizer, max_length=40), [record])
    assert group is not None
    assert text_of(tokenizer, group[1].answer_ids) == " " + "y" * 18 + "<eos>"
    assert group[0].length == 40 and group[0].cut_answer > 0


def test_a_pair_that_differs_only_in_what_was_cut_is_unusable() -> None:
    record = PairRecord(Prompt("q"), "x" * 100, ("x" * 99 + "y",), None, {}, "f: train row 7")
    encoder = Encoder(letters(), max_length=40)
    with pytest.raises(UserError, match=r"f: train row 7: chosen and rejected are the same after cutting to max_length 40"):
        encode_preferences(encoder, [record])
    assert encode_preferences(encoder, [record], "drop") == [None]


def test_real_rows_are_tokenized_within_their_budget(shared: Path) -> None:
    records = read_splits(str(shared / "data" / "hh_harmless_mild.jsonl.gz"), "pair", unusable_rows="drop").train
    tokenizer = train_tokenizer([render_prompt(record.prompt) + " " + record.chosen for record in records], 1000)
    encoder = Encoder(tokenizer, max_length=128)
    groups = encode_preferences(encoder, records, "drop")
    rows = [row for group in groups if group for row in group]
    assert max(row.length for row in rows) == 128
    assert sum(row.answer_ids[-1] == tokenizer.eos_token_id for row in rows) == len(rows) - encoder.counts["answers cut"]
    assert encoder.counts["dialogue turns dropped"] > 100
