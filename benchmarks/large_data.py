"""Memory and seconds that a run takes for JSON Lines of growing size, through the scripts of all three stages (Linux).

    OMP_WAIT_POLICY=passive python benchmarks/large_data.py [--mb 50 200 2000] [--stages sft pairs ppo] [--in_memory] [--steps 8]
        [--tokenizer bytes]

For each size a file of made-up questions and answers is written to a temporary folder, a tiny model is trained on it for a few steps by a
process of its own, and both are removed. A line has, of all processes together:

    anonymous MiB   peak of memory that belongs to them and cannot be given back (shared pages divided, files not counted): what has to fit
    resident MiB    peak of what the main process had in memory, mapped files included, which the system may take back at any time
    read s          to read, check, split and fingerprint the rows    tokenize s, MB/s    to write the ids of train and val, all cores
    total s         of the whole command, packages, model and steps included                ids MB    size of the ids on disk

`--in_memory` reads every file whole, as files up to 64 MiB always are. Some sixty bytes a row of files lie in TMPDIR while a run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.processes import THREADS, ContenderFailed
from benchmarks.scaling import family
from common.tracking import markdown_table

SCRIPTS = {"sft": "sft/train_sft.py", "pairs": "reward_model/classification/train_reward.py", "ppo": "rlhf/train_ppo.py"}
HEAD = ("stage", "file MB", "rows", "anonymous MiB", "resident MiB", "read s", "tokenize s", "MB/s", "total s", "ids MB")
_MOMENTS = {
    "read": re.compile("held out for validation"),
    "train": re.compile("note: train: tokenizing"),
    "val": re.compile("note: val: tokenizing"),
    "run": re.compile("rows; .* steps"),
}
_WHOLE = "import runpy, sys; sys.path[0] = '.'; import common.records as r; r.STREAMED_BYTES = 2**62; sys.argv.pop(0); "
_WHOLE += "runpy.run_path(sys.argv[0], run_name='__main__')"


@dataclass
class Found:
    """What was seen of a command while it ran."""

    anonymous: float = 0.0
    resident: float = 0.0
    moments: dict[str, float] = field(default_factory=dict)
    """Seconds from the start to what it said first of reading, of each split's ids, of the run; and to its end."""


def texts(seed: int = 0) -> tuple[list[str], list[str]]:
    """Beginnings of questions, and sentences: words with Zipf's frequencies."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", weights=range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    sentences = [" ".join(rng.choices(words, weights, k=rng.randint(5, 25))).capitalize() + "." for _ in range(5_000)]
    return [f"What of {' '.join(rng.choices(words, weights, k=rng.randint(4, 12)))}" for _ in range(5_000)], sentences


def write_rows(path: Path, stage: str, megabytes: float, seed: int = 0) -> int:
    """A file of about that size; returns its number of rows."""
    questions, sentences = texts(seed)
    rng = random.Random(seed)

    def answer() -> str:
        return " ".join(rng.choices(sentences, k=rng.randint(2, 16)))

    made: dict[str, Callable[[str], dict[str, str]]] = {
        "sft": lambda question: {"Question": question, "Answer": answer()},
        "pairs": lambda question: {"prompt": question, "chosen": answer(), "rejected": answer()},
        "ppo": lambda question: {"prompt": f"{question} {answer()}"},
    }
    rows, left = 0, megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            left -= file.write(json.dumps(made[stage](f"{rng.choice(questions)} {rows}?")) + "\n")
            rows += 1
    return rows


def make_model(folder: Path, tokenizer: str = "bytes") -> None:
    """A tiny causal model with a tokenizer of 8,000 entries: byte-level BPE, or whole words."""
    from common.models.load import build_generator, train_tokenizer
    from common.schema import ModelInit

    questions, sentences = texts()
    known = word_tokenizer(sentences, 8_000) if tokenizer == "words" else train_tokenizer([*questions, *sentences], 8_000)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position_embeddings": 1024}
    init = ModelInit(model_type="gpt_neo", vocab_size=8_000, config=sizes)
    build_generator(init, known, 1024, 0).save_pretrained(folder)
    known.save_pretrained(folder)


def word_tokenizer(texts: Sequence[str], size: int) -> Any:
    """The commonest words, parted at white space: it takes little time, so that a run measures all that is beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def settings(stage: str, data: Path, model: Path, runs: Path, steps: int) -> dict[str, Any]:
    """The config of a run of so many steps on this file."""
    wandb = {"wandb": {"mode": "disabled"}}
    if stage == "ppo":
        judge = runs / "judge.py"
        judge.write_text("def length(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
        return {
            "ppo_config": {"model_name": str(model), "steps": steps, "batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1},
            "generation_config": {"max_new_tokens": 8},
            "reward_config": {"pipeline": {"type": "function", "path": f"{judge}:length"}},
            "data_config": {"data_file_path": str(data)},
            "evaluation": {"num_prompts": 8, "every_n_steps": steps},
            "save_config": {"checkpoint_dir": str(runs / "models"), "save_interval": steps},
        } | wandb
    return {
        "model_name": str(model),
        "data": {"data_dir": str(data), "batch_size": 8, "max_length": 256, "validation_split_percentage": 0.5},
        "trainer": {
            "checkpoint": {"dirpath": str(runs / "models")},
            "params": {"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 4, "num_sanity_val_steps": 0},
        },
    } | wandb


def memory(pid: int) -> tuple[float, float]:
    """Anonymous memory of a process, its share of pages that several have, and all that is resident: MiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return 0.0, 0.0
    sizes = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes.get("Pss_Anon", 0.0), sizes.get("Rss", 0.0)


def watch(pid: int, found: Found, stop: threading.Event) -> None:
    while not stop.wait(0.25):
        seen = [memory(each) for each in family(pid)]
        found.anonymous = max(found.anonymous, sum(anonymous for anonymous, _ in seen))
        found.resident = max(found.resident, seen[0][1])


def run(command: Sequence[str]) -> Found:
    """Run a command and note when it says what. Raises ContenderFailed where it fails."""
    found, stop, said = Found(), threading.Event(), []
    begun = time.monotonic()
    environment = {**os.environ, **THREADS, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watcher = threading.Thread(target=watch, args=(process.pid, found, stop), daemon=True)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        for name, words in _MOMENTS.items():
            if words.search(line):
                found.moments.setdefault(name, time.monotonic() - begun)
    process.wait()
    stop.set()
    watcher.join()
    found.moments["end"] = time.monotonic() - begun
    if process.returncode:
        raise ContenderFailed(f"{' '.join(command)} failed:\n{''.join(said[-20:])}")
    return found


def measure(stage: str, megabytes: float, model: Path, *, steps: int, in_memory: bool) -> list[str]:
    """A line of the table."""
    with tempfile.TemporaryDirectory(prefix="large_data-") as name:
        folder = Path(name)
        rows = write_rows(folder / "data.jsonl", stage, megabytes)
        config = folder / "config.json"
        config.write_text(json.dumps(settings(stage, folder / "data.jsonl", model, folder, steps)))
        before = [sys.executable, "-c", _WHOLE] if in_memory else [sys.executable]
        found = run([*before, SCRIPTS[stage], "--config", str(config)])
        ids = sum(path.stat().st_size for path in (folder / "models" / "token_cache").rglob("*") if path.is_file())
        return table_row(stage + (", in memory" if in_memory else ""), (folder / "data.jsonl").stat().st_size / 1e6, rows, found, ids / 1e6)


def table_row(stage: str, megabytes: float, rows: int, found: Found, ids: float) -> list[str]:
    at = found.moments
    cells = [stage, f"{megabytes:,.0f}", f"{rows:,}", f"{found.anonymous:,.0f}", f"{found.resident:,.0f}", f"{at['read']:.1f}"]
    if "train" in at and "run" in at:
        seconds = at["run"] - at["train"]
        return [*cells, f"{seconds:.1f}", f"{megabytes / seconds:.1f}", f"{at['end']:.1f}", f"{ids:,.0f}"]
    return [*cells, "-", "-", f"{at['end']:.1f}", "-"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", nargs="+", type=float, default=[50, 200, 2000], help="sizes of the file in MB")
    parser.add_argument("--stages", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokenizer", choices=("bytes", "words"), default="bytes", help="byte-level BPE, or whole words (quicker)")
    parser.add_argument("--in_memory", action="store_true", help="read files whole, whatever their size")
    options = parser.parse_args(argv)
    lines = []
    with tempfile.TemporaryDirectory(prefix="large_data-") as name:
        make_model(Path(name), options.tokenizer)
        for stage in options.stages:
            for megabytes in options.mb:
                lines.append(measure(stage, megabytes, Path(name), steps=options.steps, in_memory=options.in_memory))
                print(lines[-1], file=sys.stderr, flush=True)
    print(markdown_table(HEAD, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
