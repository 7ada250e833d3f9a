"""What the pipeline achieved on the sample world, by truth: the oracle judges answers to test questions.

Nothing here is seen by training. Rates and oracle scores are in 0-1, KL is in nats per answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.collate import left_pad, right_pad
from common.evaluation.generate import Answer, generate_answers
from common.models.load import load_generator, load_tokenizer
from common.models.reward import RewardScorer
from common.records import Prompt, read_splits
from common.schema import GenerateParams
from common.tokenization import Encoder
from examples.world.answers import Form, same_form_pair
from examples.world.oracle import Verdict, judge
from examples.world.questions import understand

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 4  # sampled answers per question; also the candidates of best-of-4
MAX_NEW_TOKENS = 40
BATCH_SIZE = 128
PAIR_FORMS: tuple[Form, ...] = ("helpful", "terse", "rude")


@dataclass(frozen=True)
class Models:
    """Model directories that the stages left behind."""

    sft: Path = ROOT / "sft/models/latest"
    classification: Path = ROOT / "reward_model/classification/models/latest"
    regression: Path = ROOT / "reward_model/regression/models/latest"
    ppo: Path = ROOT / "rlhf/models/latest"


@dataclass(frozen=True)
class Judged:
    """One answer with what is true of it."""

    question: str
    answer: Answer
    verdict: Verdict


@dataclass(frozen=True)
class Measurement:
    """`figures`: the keys of results/quickstart.json but for `seconds`; the answers behind them, by model and way of decoding.

    by_kind: what was counted -> kind of question (`family`) -> share, 0-1.
    """

    figures: dict[str, float]
    judged: dict[str, list[Judged]]
    by_kind: dict[str, dict[str, float]]


class Writer:
    """A trained generator that answers questions."""

    def __init__(self, directory: Path) -> None:
        self.model: PreTrainedModel = load_generator(str(directory))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(directory))
        self.encoder = Encoder(self.tokenizer, prompt_format="qa", max_length=self.model.config.max_position_embeddings)

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        return self.encoder.prompts([Prompt(question) for question in questions])

    def answer(self, questions: Sequence[str], *, sample: bool, step: int = 0, seed: int = 0) -> list[Judged]:
        params = GenerateParams(do_sample=sample, max_new_tokens=MAX_NEW_TOKENS)
        answers = generate_answers(self.model, self.tokenizer, self.prompts(questions), params, seed=seed, step=step, batch_size=BATCH_SIZE)
        return [Judged(q, a, judge(q, a.text, a.ended)) for q, a in zip(questions, answers, strict=True)]


def measure(models: Models | None = None, *, seed: int = 0) -> Measurement:
    """Measure the four models on every test question (`seed`: of the sampled answers and the wordings of the right/wrong pairs)."""
    models = models or Models()
    prompts = read_splits(str(ROOT / "rlhf/data/world_prompts.json"), "prompt", require=("test",)).test
    questions = [record.prompt.question for record in prompts]
    sft, ppo = Writer(models.sft), Writer(models.ppo)
    sampled = [sft.answer(questions, sample=True, step=step, seed=seed) for step in range(SAMPLES)]
    ppo_sampled = [ppo.answer(questions, sample=True, step=step, seed=seed) for step in range(SAMPLES)]
    scorers = {name: RewardScorer(getattr(models, name), batch_size=BATCH_SIZE) for name in ("classification", "regression")}
    judged = {
        "sft sampled": _flat(sampled),
        "sft greedy": sft.answer(questions, sample=False),
        "best of 4": best_of(scorers["classification"], sampled),
        "ppo sampled": _flat(ppo_sampled),
        "ppo greedy": ppo.answer(questions, sample=False),
    }
    right_vs_wrong = {f"right_vs_wrong_{name}": right_vs_wrong_pairs(scorer, questions, seed) for name, scorer in scorers.items()}
    right = {
        f"right_{name}_greedy": [(one.question, float(one.verdict.right)) for one in judged[f"{name} greedy"]] for name in ("sft", "ppo")
    }
    figures = {
        **{f"pair_accuracy_{name}": pair_accuracy(scorer) for name, scorer in scorers.items()},
        **{name: fmean(share for _, share in shares) for name, shares in right_vs_wrong.items()},
        "oracle_sft": mean_score(judged["sft sampled"]),
        "oracle_sft_greedy": mean_score(judged["sft greedy"]),
        "oracle_best_of_4": mean_score(judged["best of 4"]),
        "oracle_ppo": mean_score(judged["ppo sampled"]),
        "oracle_ppo_greedy": mean_score(judged["ppo greedy"]),
        "kl_ppo": kl_per_answer(ppo, sft, ppo_sampled[0]),
        "eos_rate_ppo": fmean(one.answer.ended for one in judged["ppo sampled"]),
        "commonest_answer_share_ppo": commonest_share([one.answer.text for one in judged["ppo sampled"]]),
    }
    return Measurement(figures, judged, {name: by_kind(shares) for name, shares in {**right_vs_wrong, **right}.items()})


def mean_score(judged: Sequence[Judged]) -> float:
    """Mean oracle score, 0-1."""
    return fmean(one.verdict.score for one in judged)


def best_of(scorer: RewardScorer, samples: Sequence[Sequence[Judged]]) -> list[Judged]:
    """For each question the sample that the reward model scores highest."""
    scores = [
        scorer.score([one.question for one in row], [one.answer.text for one in row], [one.answer.ended for one in row]) for row in samples
    ]
    return [row[max(range(len(row)), key=lambda i, q=q: scores[i][q])] for q, row in enumerate(zip(*samples, strict=True))]


def pair_accuracy(scorer: RewardScorer) -> float:
    """Share of the held-out preference pairs that the scorer orders as the votes did; a tie counts half."""
    path = ROOT / "reward_model/classification/data/world_pairs.json"
    pairs = read_splits(str(path), "pair", require=("test",)).test
    chosen = scorer.score([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    rejected = scorer.score([pair.prompt for pair in pairs], [pair.rejected[0] for pair in pairs])
    return fmean(_order(c, r) for c, r in zip(chosen, rejected, strict=True))


def right_vs_wrong_pairs(scorer: RewardScorer, questions: Sequence[str], seed: int) -> list[tuple[str, float]]:
    """(question, 1 where the right answer scores higher, else 0; a tie 0.5) of pairs that are alike but for the value."""
    rng = random.Random(f"right against wrong {seed}")
    rows = [(q, *same_form_pair(understand(q), form, rng)) for q in questions for form in PAIR_FORMS]
    right = scorer.score([row[0] for row in rows], [row[1] for row in rows])
    wrong = scorer.score([row[0] for row in rows], [row[2] for row in rows])
    return [(row[0], _order(r, w)) for row, r, w in zip(rows, right, wrong, strict=True)]


def by_kind(shares: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Kind of question -> mean of what was counted for its questions."""
    kinds: dict[str, list[float]] = {}
    for question, share in shares:
        kinds.setdefault(family(question), []).append(share)
    return {kind: fmean(kinds[kind]) for kind in sorted(kinds)}


def kl_per_answer(policy: Writer, reference: Writer, judged: Sequence[Judged]) -> float:
    """KL(policy || reference) in nats per answer, on answers sampled from the policy.

    At each token the divergence is summed over the whole vocabulary, which has far less spread than log-ratios of sampled tokens.
    """
    prompts = policy.prompts([one.question for one in judged])
    assert prompts == reference.prompts([one.question for one in judged]), "policy and reference differ in tokenizer"
    total = 0.0
    for start in range(0, len(judged), BATCH_SIZE):
        prompt_ids, prompt_mask = left_pad(prompts[start : start + BATCH_SIZE], 0)
        answer_ids, answer_mask = right_pad([one.answer.ids for one in judged[start : start + BATCH_SIZE]], 0)
        ids, mask = torch.cat([prompt_ids, answer_ids], dim=1), torch.cat([prompt_mask, answer_mask], dim=1)  # (B, S)
        p, q = (_next_token_logprobs(writer.model, ids, mask, answer_ids.shape[1]) for writer in (policy, reference))  # (B, T, V)
        total += float(((p.exp() * (p - q)).sum(-1) * answer_mask).sum())
    return total / len(judged)


def commonest_share(answers: Sequence[str]) -> float:
    """Share of the text that occurs most often."""
    return Counter(answers).most_common(1)[0][1] / len(answers)


def family(question: str) -> str:
    """`fact` or `compare`, marked when training never saw the phrasing."""
    understood = understand(question)
    return understood.family + (" (unseen phrasing)" if understood.unseen_phrasing else "")


@torch.inference_mode()
def _next_token_logprobs(model: PreTrainedModel, ids: Tensor, mask: Tensor, answer_length: int) -> Tensor:
    """Log-probabilities (B, T, V) of each answer token's alternatives."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits
    return logits[:, -answer_length - 1 : -1].float().log_softmax(-1)


def _order(high: float, low: float) -> float:
    return 0.5 if high == low else float(high > low)


def _flat(samples: Sequence[Sequence[Judged]]) -> list[Judged]:
    return [one for row in samples for one in row]
