"""Answer the questions of a data file with a PPO model and measure the answers: the same evaluation as `sft/test_sft.py`.

    python test_ppo.py --config configs/test_config.yaml [section.key=value ...] [--compare MODEL] [--validate]

Writes a CSV of answers with BLEU and ROUGE (continued where it stopped when started again) and a summary beside it. It trains nothing
and reads no split but the one named. What happens stands in `common/evaluation/run.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parent)  # modules have one import name, whichever folder this runs from

from common.errors import run_main
from common.evaluation.run import run_generation_test


def main(argv: Sequence[str]) -> int:
    return run_generation_test(argv, stage_dir=STAGE_DIR, description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
