"""All three stages on real community questions and answers: a model of 2.6 M parameters from scratch, beside trivial baselines.

    python examples/real_data.py DATA [--output results/real_data] [--ppo_steps 40] [section.key=value for every SFT and reward run]

DATA is a folder with `cqa_sft.json`, `cqa_classification.json`, `cqa_regression.json`, and the same for `gpt4_rated` and `oasst_ranked`
as far as they are there. Runs the same scripts as the README on copies with a `Domain` column, guessed from a question's words; writes
`real_data.json` and prints the tables that the README shows. Started again, it trains only what is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from common.runs import write_text_atomically
from examples.real_results import RealResults, markdown

REWARD_DATA = {
    "classification": ("cqa_classification.json", "gpt4_rated_classification.json", "oasst_ranked_classification.json"),
    "regression": ("cqa_regression.json", "gpt4_rated_regression.json"),
}
# What a question is about: the first pattern that its words match. The rest of the community's questions are about artificial intelligence.
DOMAINS = {
    "programming": r"airflow|\bpython\b|\bdags?\b|`|\bdocker|\bsql\b|\bdjango\b|\bdef\b|\bimport\b",
    "beer": r"\b(beers?|ales?|lagers?|brew\w*|ipas?|stouts?|wines?|whisk\w*|hops|ciders?|alcohol\w*|bottles?|kegs?)\b",
    "coffee": r"\b(coffee|espresso\w*|caffein\w*|grind\w*|roast\w*|cappuc\w*|latte)\b",
    "teaching mathematics": r"\b(students?|teach\w*|calculus|math\w*|algebra\w*|courses?|exams?|geometry|homework)\b",
}
OTHER_DOMAIN = "artificial intelligence"


def domain(question: str) -> str:
    """The subject of a community question, guessed from its words."""
    return next((name for name, words in DOMAINS.items() if re.search(words, question, re.IGNORECASE)), OTHER_DOMAIN)


def copy_with_domains(source: Path, target: Path) -> Path:
    """A copy of a file of splits whose rows have a `Domain`."""
    splits = json.loads(source.read_text(encoding="utf-8"))
    rows = {name: [{**row, "Domain": domain(row["Question"])} for row in split] for name, split in splits.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(target, json.dumps(rows, ensure_ascii=False) + "\n")
    return target


def stage(script: str, config: str, *overrides: str) -> None:
    """Run a stage's script; end with its exit code where it fails."""
    command = [sys.executable, str(ROOT / script), "--config", str(ROOT / Path(script).parent / "configs" / config), *overrides]
    print(f"\n$ python {script} --config {Path(script).parent}/configs/{config} {' '.join(overrides)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def train(script: str, config: str, runs: Path, *overrides: str) -> None:
    """Run a training script unless `runs` holds a finished run."""
    if (runs / "latest").exists():
        print(f"\nalready trained: {runs / 'latest'}")
    else:
        stage(script, config, *overrides)


def summary(path: Path) -> dict[str, Any]:
    """What a script summed up, without the paths of this machine."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if not (isinstance(value, str) and Path(value).is_absolute())}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of data files")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "real_data", help="folder for runs and figures")
    parser.add_argument("--ppo_steps", type=int, default=40, help="PPO steps; 0 leaves PPO out")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every SFT and reward training")
    options = parser.parse_intermixed_args(list(argv))
    data, output = options.data.absolute(), options.output.absolute()
    results: RealResults = {}

    sft_data, sft = data / "cqa_sft.json", output / "sft"
    train(
        "sft/train_sft.py", "community_qa.yaml", sft, f"data.data_dir={sft_data}", f"trainer.checkpoint.dirpath={sft}", *options.overrides
    )  # fmt: skip
    stage(
        "sft/test_sft.py", "test_config.yaml", f"data.data_dir={sft_data}", f"model_name={sft / 'latest'}",
        "data.max_prompt_length=96", "generate_params.max_new_tokens=128", "generate_params.no_repeat_ngram_size=3",
        f"test_params.log_file={output / 'sft.csv'}",
    )  # fmt: skip
    results["sft"] = {"training": training_summary(sft), "test": summary(output / "sft.summary.json")}

    for kind, files in REWARD_DATA.items():
        for file in files:
            if not (data / file).exists():
                print(f"left out: {data / file} is not there")
                continue
            name, folder = Path(file).stem, f"reward_model/{kind}"
            runs = output / name
            community = name.startswith("cqa")
            rows = copy_with_domains(data / file, output / "data" / file) if community else data / file
            train(
                f"{folder}/train_reward.py", "community_qa.yaml", runs, f"data.data_dir={rows}", f"model_name={sft / 'latest'}",
                f"trainer.checkpoint.dirpath={runs}", *options.overrides,
            )  # fmt: skip
            stage(
                f"{folder}/test_reward.py", "test_config.yaml", f"data.data_dir={rows}", f"model_name={runs / 'latest'}",
                "data.max_prompt_length=96", f"test_params.log_file={output / (name + '.csv')}",
                *(["test_params.breakdown_by=[Domain]"] if community else []),
            )  # fmt: skip
            results[name] = {"training": training_summary(runs), **summary(output / f"{name}.summary.json")}

    if options.ppo_steps:
        ppo = output / "ppo"
        train(
            "rlhf/train_ppo.py", "community_qa.yaml", ppo, f"data_config.data_file_path={sft_data}",
            f"ppo_config.model_name={sft / 'latest'}",
            f"reward_config.reward_model_name={output / 'cqa_classification' / 'latest'}", f"save_config.checkpoint_dir={ppo}",
            f"ppo_config.steps={options.ppo_steps}",
        )  # fmt: skip
        results["ppo"] = {"training": training_summary(ppo)}
    write_text_atomically(output / "real_data.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(f"\n{markdown(results)}\nfigures: {output / 'real_data.json'}")
    return 0


def training_summary(runs: Path) -> dict[str, Any]:
    """`summary.json` of the newest finished run."""
    return summary((runs / "latest").resolve().parents[1] / "summary.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
