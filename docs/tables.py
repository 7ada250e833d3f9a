"""Regenerates tables of the README and of docs/llm_on_ray.md: settings, metrics and keys from the code, results from docs/results.

    python docs/tables.py [--check]

A table stands between `<!-- KIND:NAME -->` and `<!-- /KIND -->`, KIND being settings, readouts, metrics, results or keys. `--check` changes
nothing and exits with 1 where a document is not current.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from pydantic import BaseModel

from benchmarks import frontier_results
from common.evaluation.config import GenerationTestConfig
from common.llm_on_ray import KEYS, NO_EFFECT, REFUSED
from common.readout_settings import READS, SETTINGS, Place, ReadoutName
from common.schema_docs import settings_table
from common.tracking import markdown_table
from examples import readout_results, real_results
from examples import results as quickstart_results
from reward_model.comparison_config import ComparisonConfig
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig
from reward_model.logged import PAIR_MEMBER_METRICS, PAIR_METRICS, PAIR_TRAINING_METRICS, SCORE_MEMBER_METRICS, SCORE_METRICS
from rlhf.config import PPORunConfig
from sft.config import SFTConfig
from sft.metrics import GENERATION_METRICS, VALIDATION_METRICS

SCHEMAS: dict[str, type[BaseModel]] = {
    "sft": SFTConfig,
    "classification": ClassificationConfig,
    "regression": RegressionConfig,
    "ppo": PPORunConfig,
    "generation_test": GenerationTestConfig,
    "reward_test": RewardTestConfig,
    "comparison": ComparisonConfig,
}
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "llm_on_ray.md")
RESULTS = ROOT / "docs" / "results"


def metrics(name: str) -> dict[str, str]:
    """Metric -> definition, of one stage (its modules import torch, so they are imported only here)."""
    if name in ("sft", "classification", "regression"):
        from common.launch.callbacks import TRAINING_METRICS

        stage = {
            "sft": {**VALIDATION_METRICS, **GENERATION_METRICS},
            "classification": {**PAIR_TRAINING_METRICS, **PAIR_METRICS, **PAIR_MEMBER_METRICS},
            "regression": {**SCORE_METRICS, **SCORE_MEMBER_METRICS},
        }[name]
        return {**TRAINING_METRICS, **stage}
    assert name == "ppo", name
    from rlhf.ppo.metrics import METRICS as PPO

    return dict(PPO)


def settings_section(name: str) -> str:
    return folded("every setting", settings_table(SCHEMAS[name]))


POOLING: dict[ReadoutName, str] = {
    "last_token": "the final state itself, through a linear head: what `AutoModelForSequenceClassification` computes",
    "mean_pool": "the mean of the final states",
    "layerwise_attention": "in each layer attention over tokens, its query behind a gated (GEGLU) projection; learnt weights over layers",
    "full_attention_pooling": "attention over the tokens of each layer, then attention over layers",
    "weighted_layers": "learnt weights over layers",
    "attention_pooled_encoder": "attention over layers",
    "attention_pooled_decoder": "attention over layers",
    "decoder_output": "the final state",
}
_TOKENS = {"all": "all tokens", "first": "first token", "last": "last token"}


def place_words(place: Place | None) -> str:
    """What is read, in words; an encoder-decoder's decoder has no other first token than the one it starts from."""
    if place is None:
        return "—"
    if place.part == "decoder":
        return "decoder's last token" if place.token == "last" else "decoder's start token"
    return f"encoder's {_TOKENS[place.token].removeprefix('all ')}" if place.part == "encoder" else _TOKENS[place.token]


def readouts_table(name: str) -> str:
    """Every readout with what it reads of each kind of transformer."""
    assert name == "all", name
    rows = []
    for readout, places in READS.items():
        words = [place_words(places.get(kind)) for kind in ("causal", "encoder", "encoder_decoder")]
        settings = ", ".join(f"`{setting}`" for setting in SETTINGS[readout])
        rows.append([f"`{readout}`", *words, POOLING[readout], settings])
    return f"\n{markdown_table(('`name`', 'causal', 'encoder', 'encoder-decoder', 'score of', 'settings'), rows)}\n\n"


def folded(summary: str, table: str) -> str:
    """A table that a reader opens."""
    return f"\n<details><summary>{summary}</summary>\n\n{table.strip()}\n\n</details>\n\n"


def metrics_table(name: str) -> str:
    rows = [(f"`{metric}`", text) for metric, text in metrics(name).items()]
    return folded("every metric", markdown_table(("metric", "definition"), rows))


def results_section(name: str) -> str:
    """What a run wrote: its JSON file stands in docs/results."""
    if name == "quickstart":
        return f"\n{quickstart_results.markdown(quickstart_results.Results.load(RESULTS / 'quickstart.json'))}\n"
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if name == "frontier":
        return f"\n{frontier_results.markdown(found)}\n"
    if name == "readouts":
        return f"\n{readout_results.markdown(found)}\n"
    assert name == "real_data", name
    return f"\n{real_results.markdown(found)}\n"


def keys_table(section: str) -> str:
    """The keys of a section of llm-on-ray's configs, with what they are in every stage."""

    def cell(text: str) -> str:
        return {NO_EFFECT: "no effect", REFUSED: "—"}.get(text, f"`{text}`")

    rows = []
    for key, row in KEYS.items():
        where, _, name = key.partition(".")
        if section == (where if where in ("General", "Dataset") else "Training"):
            shown = name if where == section else key
            rows.append([f"`{shown}`", *map(cell, (row.sft, row.reward, row.ppo)), row.why])
    return f"\n{markdown_table((f'`{section}`', 'SFT', 'reward models', 'PPO', ''), rows)}\n\n"


def regenerate(text: str) -> str:
    """A document with every table made anew."""
    makers: dict[str, Callable[[str], str]] = {
        "settings": settings_section,
        "readouts": readouts_table,
        "metrics": metrics_table,
        "results": results_section,
        "keys": keys_table,
    }

    def replace(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}:{match[2]} -->\n{makers[match[1]](match[2])}<!-- /{match[1]} -->"

    return re.sub(rf"<!-- ({'|'.join(makers)}):(\w+) -->.*?<!-- /\1 -->", replace, text, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    code = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        current = regenerate(text)
        if current == text:
            continue
        if "--check" in argv:
            print(f"{document.name} is not current; make docs regenerates it")
            code = 1
            continue
        document.write_text(current, encoding="utf-8")
        print(f"{document.name} regenerated")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
