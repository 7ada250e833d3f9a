"""Regenerates the tables of settings and metrics in the documents from the code.

    python docs/tables.py [--check]

A table stands between `<!-- settings:NAME -->` (or `<!-- metrics:NAME -->`) and `<!-- /settings -->` (`<!-- /metrics -->`).
`--check` changes nothing and exits with 1 where a document is not current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from pydantic import BaseModel

from common.evaluation.config import GenerationTestConfig
from common.schema_docs import settings_table
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig
from reward_model.logged import PAIR_METRICS, PAIR_TRAINING_METRICS, SCORE_METRICS
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
}
DOCUMENTS = ("README.md", "sft/README.md", "reward_model/classification/README.md", "reward_model/regression/README.md", "rlhf/README.md")


def metrics(name: str) -> dict[str, str]:
    """Metric -> definition, of one stage (its modules import torch, so they are imported only here)."""
    if name in ("sft", "classification", "regression"):
        from common.launch.callbacks import TRAINING_METRICS

        stage = {
            "sft": {**VALIDATION_METRICS, **GENERATION_METRICS},
            "classification": {**PAIR_TRAINING_METRICS, **PAIR_METRICS},
            "regression": SCORE_METRICS,
        }[name]
        return {**TRAINING_METRICS, **stage}
    assert name == "ppo", name
    from rlhf.ppo.metrics import METRICS as PPO

    return dict(PPO)


def settings_section(name: str) -> str:
    return f"\n{settings_table(SCHEMAS[name])}\n"


def metrics_table(name: str) -> str:
    rows = "".join(f"| `{metric}` | {text} |\n" for metric, text in metrics(name).items())
    return f"\n| metric | definition |\n|---|---|\n{rows}\n"


def regenerate(text: str) -> str:
    """A document with every table made anew."""
    makers: dict[str, Callable[[str], str]] = {"settings": settings_section, "metrics": metrics_table}

    def replace(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}:{match[2]} -->\n{makers[match[1]](match[2])}<!-- /{match[1]} -->"

    return re.sub(r"<!-- (settings|metrics):(\w+) -->.*?<!-- /\1 -->", replace, text, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        current = regenerate(text)
        if current != text:
            stale.append(name)
            if "--check" not in argv:
                path.write_text(current, encoding="utf-8")
    if stale:
        print(f"{'not current' if '--check' in argv else 'regenerated'}: {', '.join(stale)}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
