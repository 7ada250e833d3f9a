"""Every readout over three small frozen backbones on real data: a GPT-Neo and a T5 built from config, and stories260K.

    python examples/compare_readouts.py DATA STORIES [--output results/readouts] [section.key=value for every comparison]

DATA is a folder with `cqa_sft.json`, `cqa_classification.json`, `oasst_ranked_classification.json` and `gpt4_rated_regression.json`,
STORIES the model directory of stories260K. GPT-Neo and T5 are trained on the answers of `cqa_sft.json` first, for some minutes: a
backbone that has read nothing gives a readout nothing to read. Writes `readouts.json` and a picture, and prints the tables that the README
shows. Started again, it trains only what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from common.runs import write_text_atomically
from examples.readout_results import load, markdown
from examples.real_data import stage, train
from reward_model.comparison_report import Comparison, draw

DATA = {"cqa_classification": "pairs", "oasst_ranked_classification": "pairs", "gpt4_rated_regression": "scores"}
# name -> model_init of the backbones that are built here
BUILT = {
    "gpt_neo": "{model_type: gpt_neo, vocab_size: 2048, config: {hidden_size: 128, num_layers: 4, num_heads: 4, intermediate_size: 512, "
    "window_size: 64, max_position_embeddings: 256}}",
    "t5": "{model_type: t5, vocab_size: 2048, config: {d_model: 128, d_kv: 32, num_heads: 4, d_ff: 256, num_layers: 4, "
    "num_decoder_layers: 2, feed_forward_proj: gated-gelu}}",
}
SFT = ("data.max_length=192", "trainer.params.max_steps=400", "trainer.params.val_check_interval=100", "model_params.learning_rate=2e-3")
COMPARISON = (
    "data.max_length=192", "data.max_prompt_length=64", "data.unusable_rows=drop", "data.batching=bucketed", "data.batch_size=16",
    "model_params.cache_states=bfloat16",
)  # fmt: skip
EPOCHS = {"cqa_classification": 2, "oasst_ranked_classification": 8, "gpt4_rated_regression": 4}  # the smaller, the more


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of data files")
    parser.add_argument("stories", type=Path, help="model directory of stories260K")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "readouts", help="folder for runs and figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every comparison")
    options = parser.parse_intermixed_args(list(argv))
    data, output = options.data.absolute(), options.output.absolute()
    backbones = {"stories260K": options.stories.absolute()}
    for name, init in BUILT.items():
        runs = output / name
        sft = (f"data.data_dir={data / 'cqa_sft.json'}", f"trainer.checkpoint.dirpath={runs}", f"desc={name}", f"model_init={init}")
        train("sft/train_sft.py", "community_qa.yaml", runs, *sft, *SFT)
        backbones[name] = runs / "latest"

    results: dict[str, dict[str, Any]] = {}
    for backbone, model in sorted(backbones.items()):
        for name, objective in DATA.items():
            place = output / "comparisons" / f"desc-{backbone}-{name},index-0"
            if not (place / "comparison.json").exists():
                stage(
                    "reward_model/compare_readouts.py", "compare_readouts.yaml", *(["--resume"] if place.exists() else []),
                    f"objective={objective}", f"desc={backbone}-{name}", "index=0", f"data.data_dir={data / name}.json",
                    f"model_name={model}", f"trainer.checkpoint.dirpath={place.parent}", f"trainer.params.max_epochs={EPOCHS[name]}",
                    *COMPARISON, *options.overrides,
                )  # fmt: skip
            found = Comparison.load(json.loads((place / "comparison.json").read_text(encoding="utf-8")))
            results.setdefault(backbone, {})[name] = json.loads(replace(found, backbone=backbone).json())
    write_text_atomically(output / "readouts.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    draw(load(results), output / "readouts.png")
    print(f"\n{markdown(results)}\nfigures: {output / 'readouts.json'}, readouts.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
