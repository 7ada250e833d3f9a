"""BLEU and ROUGE of generated answers, offline and in any script.

BLEU is sacrebleu's (0-100, tokenization 13a), ROUGE rouge-score's F-measures (0-1). On their own both libraries fail on text without
spaces between words (rouge-score drops every letter but a-z, so Chinese scores 0): here Han, Kana, Thai and the like count per character.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from common.words import set_apart, split_words

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
METRICS = ("bleu", "rouge1_fmeasure", "rouge2_fmeasure", "rougeL_fmeasure")


class _Tokenizer:
    """`split_words` in the shape that rouge-score wants."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(list(ROUGE_TYPES), tokenizer=_Tokenizer())


@cache
def _sentence_bleu() -> BLEU:
    return BLEU(effective_order=True)


def sentence_bleu(answer: str, reference: str) -> float:
    """BLEU of one answer, 0-100, smoothed, over the n-gram orders that the answer is long enough for."""
    return float(_sentence_bleu().sentence_score(set_apart(answer), [set_apart(reference)]).score)


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all answers together, 0-100 (not the mean of their own BLEU); 0 for no answers."""
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers, {len(references)} references")
    if not answers:
        return 0.0
    corpus = BLEU(force=True)  # force: no advice about tokenized periods
    return float(corpus.corpus_score([set_apart(text) for text in answers], [[set_apart(text) for text in references]]).score)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F-measures 0-1 under `rouge1_fmeasure`, `rouge2_fmeasure`, `rougeL_fmeasure`."""
    scores = _rouge().score(reference, answer)
    return {f"{name}_fmeasure": float(scores[name].fmeasure) for name in ROUGE_TYPES}


def answer_metrics(answer: str, reference: str) -> dict[str, float]:
    """The metrics of one answer, keys as in `METRICS`."""
    return {"bleu": sentence_bleu(answer, reference), **rouge(answer, reference)}


def corpus_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and mean ROUGE F-measures, keys as in `METRICS`; zeros for no answers."""
    per_row = [rouge(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    means = {name: sum(row[name] for row in per_row) / max(len(per_row), 1) for name in METRICS if name != "bleu"}
    return {"bleu": corpus_bleu(answers, references), **means}
