"""BLEU and ROUGE on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu

from common.evaluation.text_metrics import answer_metrics, corpus_bleu, corpus_metrics, rouge, sentence_bleu


def test_equal_texts_score_full_and_disjoint_ones_nothing() -> None:
    full = answer_metrics("The capital of France is Paris.", "The capital of France is Paris.")
    assert full["bleu"] == pytest.approx(100)
    assert [full[f"rouge{n}_fmeasure"] for n in (1, 2, "L")] == [1, 1, 1]
    none = answer_metrics("banana", "The capital of France is Paris.")
    assert set(none.values()) == {0.0}


def test_empty_answers_score_zero_without_an_error() -> None:
    assert set(answer_metrics("", "Paris.").values()) == {0.0}
    assert set(answer_metrics("", "").values()) == {0.0}
    assert set(corpus_metrics([], []).values()) == {0.0}


def test_rouge_by_hand() -> None:
    # answer: a b c d; reference: a c b d e. Shared words 4: precision 4/4, recall 4/5, F = 8/9.
    # Shared pairs: none of ab, bc, cd is among ac, cb, bd, de. Longest common subsequence a b d (3): 3/4, 3/5, F = 2/3.
    scores = rouge("a b c d", "a c b d e")
    assert scores["rouge1_fmeasure"] == pytest.approx(8 / 9)
    assert scores["rouge2_fmeasure"] == 0
    assert scores["rougeL_fmeasure"] == pytest.approx(2 / 3)


def test_sentence_bleu_by_hand() -> None:
    # answer of 5 words against 6: unigrams 5/5, bigrams 3/4, trigrams 2/3, 4-grams 1/2, brevity exp(1 - 6/5)
    expected = math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert sentence_bleu("the cat sat on mat", "the cat sat on the mat") == pytest.approx(100 * expected)


def test_a_short_right_answer_is_not_punished_for_missing_4_grams() -> None:
    assert sentence_bleu("Paris", "Paris") == pytest.approx(100)


def test_corpus_bleu_is_no_mean_of_sentences() -> None:
    answers, references = ["the cat sat on mat", "a b c d e"], ["the cat sat on the mat", "a b c d e"]
    # n-gram matches summed over both rows: 10/10, 7/8, 5/6, 3/4; lengths 10 against 11
    expected = math.exp(1 - 11 / 10) * (7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert corpus_bleu(answers, references) == pytest.approx(100 * expected)


def test_text_with_spaces_scores_exactly_as_sacrebleu() -> None:
    answers = ["Don't panic, it's only 3.5 euros!", "Ελληνικά και русский текст."]
    references = ["Do not panic: it is 3.5 euros.", "Ελληνικά και другой текст."]
    assert corpus_bleu(answers, references) == sacrebleu.corpus_bleu(answers, [references]).score
    assert sentence_bleu(answers[0], references[0]) == sacrebleu.sentence_bleu(answers[0], [references[0]]).score


def test_chinese_counts_by_character() -> None:
    # 北京是首都 against 首都是北京: all five characters shared; pairs 北京 and 首都 of four; longest common subsequence 2
    scores = rouge("北京是首都。", "首都是北京。")
    assert scores["rouge1_fmeasure"] == 1
    assert scores["rouge2_fmeasure"] == pytest.approx(2 / 4)
    assert scores["rougeL_fmeasure"] == pytest.approx(2 / 5)
    assert sentence_bleu("北京是中国的首都。", "北京是中国首都。") > 30
    assert sacrebleu.sentence_bleu("北京是中国的首都。", ["北京是中国首都。"]).score < 5  # what plain 13a makes of it


def test_corpus_rouge_is_the_mean_of_rows() -> None:
    figures = corpus_metrics(["a b", "x"], ["a b", "y"])
    assert figures["rouge1_fmeasure"] == 0.5
    with pytest.raises(ValueError, match="1 answers, 2 references"):
        corpus_bleu(["a"], ["a", "b"])
