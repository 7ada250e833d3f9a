"""What a PPO step would take on 1 to 512 GPUs, by counting, and how far the same counting is off where a step was measured.

    python benchmarks/scaling_plan.py [--picture]       make the tables of docs/scaling.md anew (`make docs`), and its picture
    python benchmarks/scaling_plan.py --check           change nothing; exit code 1 where the document is not current
    python benchmarks/scaling_plan.py --policy 7B --gpus 16 [--answers 2048 --prompt 512 --answer 512 --longest 1024]     another case

Nothing is measured here: `benchmarks/scaling_model.py` has the formulas, this file what they start from. In the document tables stand
between `<!-- plan:NAME -->` and `<!-- /plan -->`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.scaling_check import memory_rows, speed_rows
from benchmarks.scaling_model import (
    FULL,
    LOGITS,
    SHORT,
    Device,
    Layout,
    Plan,
    Run,
    Transformer,
    behind,
    ddp,
    fsdp,
    fsdp_here,
    hybrid,
    lora,
    sampling_memory,
    scoring_memory,
    split,
    training_state,
    training_step,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCUMENT = ROOT / "docs" / "scaling.md"
PICTURE = ROOT / "docs" / "results" / "scaling.png"

H100 = Device(
    name="H100 SXM, eight to a node",
    peak=989e12,
    generate_share=0.5,
    score_share=0.5,
    train_share=0.5,
    bandwidth=3.35e12,
    bandwidth_share=0.68,
    states=2.3e12,
    memory=80e9,
    unusable=6e9,
    launch=75e-6,
    replay=20e-6,
    per_node=8,
    link=360e9,
    network=47e9,
    protocols=((8.4e-6, 3.4e-6, 9.6e-6, 1.0), (3.6e-6, 0.47e-6, 2.7e-6, 0.25)),
    sources={
        "peak": "[H100 datasheet](https://www.nvidia.com/en-us/data-center/h100/): bfloat16, dense",
        "generate_share": "assumed; decides only where products, not bytes, bound decoding",
        "score_share": "assumed: with `states` and launches 7B comes to the 38 to 43 % of [Llama 3](https://arxiv.org/abs/2407.21783)",
        "train_share": "the same",
        "bandwidth": "H100 datasheet",
        "bandwidth_share": "[gpt-fast](https://github.com/pytorch-labs/gpt-fast): Llama-2-7B reads 1,397 of an A100's 2,039 GB/s",
        "states": "bandwidth times that share",
        "memory": "H100 datasheet",
        "unusable": "assumed: CUDA, NCCL's buffers, fragmentation",
        "launch": "assumed: 15 kernels of 5 µs per layer",
        "replay": "assumed: 15 kernels of 1.3 µs per layer in a CUDA graph (`ppo_config.static_decoding`)",
        "per_node": "DGX / HGX H100",
        "link": "NVLink 4: 450 GB/s each way ([HGX H100](https://developer.nvidia.com/blog/introducing-nvidia-hgx-h100-an-accelerated-server-"
        "platform-for-ai-and-high-performance-computing/)), 0.8 of it assumed to be reached",
        "network": "400 Gb/s per GPU, 46 to 48 GB/s reached ([nccl-tests #290](https://github.com/NVIDIA/nccl-tests/issues/290))",
        "protocols": "NCCL's own [model](https://github.com/NVIDIA/nccl/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc):"
        " protocols Simple and LL: µs at the start, per NVLink step, per network step, share of the bandwidth",
    },
)
SHOWN_UNITS = {
    "peak": (1e12, "TFLOP/s"),
    "bandwidth": (1e12, "TB/s"),
    "states": (1e12, "TB/s"),
    "memory": (1e9, "GB"),
    "unusable": (1e9, "GB"),
    "launch": (1e-6, "µs per layer"),
    "replay": (1e-6, "µs per layer"),
    "link": (1e9, "GB/s"),
    "network": (1e9, "GB/s"),
    "per_node": (1, "GPUs"),
}

POLICIES = (
    Transformer("125M", 768, 12, 12, 12, 3072, 50257, tied=True, positions=2048),
    Transformer("1B", 2048, 18, 16, 16, 8192, 50257, tied=True, positions=2048),
    Transformer("7B", 4096, 32, 32, 32, 11008, 32000, gated=True),
    Transformer("70B", 8192, 80, 64, 8, 28672, 32000, gated=True),
)
LIKE = {"125M": "GPT-Neo 125M", "1B": "`benchmarks/gpu.py`'s `1b`", "7B": "Llama 2 7B", "70B": "Llama 2 70B"}
LARGEST_JUDGE = "7B"
RUN = Run()
GPUS = (1, 8, 64, 512)
LAYOUTS: dict[str, Layout] = {
    "DDP": ddp,
    "DDP, LoRA": lora,
    "FSDP here": fsdp_here,
    "FSDP": fsdp,
    "FSDP in nodes": hybrid,
    "split": split,
    "split, one step behind": behind,
}


def judge_of(policy: Transformer) -> Transformer:
    """The reward model: of the policy's size, 7B at most."""
    largest = next(model for model in POLICIES if model.name == LARGEST_JUDGE)
    return min(policy, largest, key=lambda model: model.parameters)


def plans(policy: Transformer, gpus: int, run: Run = RUN) -> Iterator[Plan]:
    """Every layout that there is with so many GPUs."""
    for name, layout in LAYOUTS.items():
        divided = name.startswith("split")
        if (gpus == 1 and (divided or name.startswith("FSDP"))) or (gpus <= H100.per_node and name == "FSDP in nodes"):
            continue
        yield layout(H100, policy, judge_of(policy), run, gpus)


def speed(plan: Plan, run: Run = RUN) -> float:
    """Answer tokens per second and GPU."""
    return run.answers * run.answer / plan.seconds / plan.gpus


# --- tables --------------------------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def figure(number: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1,230."""
    if number == 0:
        return "0"
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def assumptions() -> str:
    rows = []
    for name, source in H100.sources.items():
        value = getattr(H100, name)
        if name == "protocols":
            shown = "; ".join(f"{base * 1e6:.1f} + {link * 1e6:.2f} + {net * 1e6:.1f}, {share:g}" for base, link, net, share in value)
        else:
            scale, unit = SHOWN_UNITS.get(name, (1, "of it" if name == "bandwidth_share" else "of `peak`"))
            shown = f"{value / scale:.4g} {unit}"
        rows.append([f"`{name}`", shown, source])
    return markdown(("number", "value", "from"), rows)


def policies() -> str:
    rows = []
    for model in POLICIES:
        texts = [model.kept(RUN.tokens, SHORT, checkpointing) / 1e9 for checkpointing in (False, True)]
        rows.append(
            [
                model.name,
                LIKE[model.name],
                f"{model.parameters / 1e9:.3g}",
                f"{model.forward(1, RUN.tokens, RUN.answer) / 1e12:.3g}",
                figure(model.cache(SHORT) / 1e3),
                figure(sampling_memory(model, RUN, 1) / 1e9),
                *(figure(text) for text in texts),
                figure(LOGITS * RUN.answer * model.vocabulary / 1e9),
            ]
        )
    head = ("policy", "sizes of", "10^9 parameters", "TFLOP a text's forward", "keys and values, kB a token", "GB an answer")
    return markdown((*head, "states, GB a text", "with checkpointing", "logits, GB a text"), rows)


def speeds() -> str:
    rows = []
    for policy in POLICIES:
        for gpus in GPUS:
            found = {plan.layout: plan for plan in plans(policy, gpus)}
            fast = max((speed(plan) for plan in found.values() if plan.fits and plan.layout != "split, one step behind"), default=0.0)
            cells = []
            for name in LAYOUTS:
                plan = found.get(name)
                if plan is None:
                    cells.append("")
                elif not plan.fits:
                    cells.append(f"memory, {plan.missing / 1e9:,.0f} GB short")
                else:
                    shown = figure(speed(plan))
                    cells.append(f"{f'**{shown}**' if speed(plan) == fast else shown} {plan.bottleneck}")
            rows.append([policy.name, str(gpus), *cells])
    return markdown(("policy", "GPUs", *LAYOUTS), rows)


DETAILS = (
    *("layout", "GPUs", "step, s", "generate", "score", "train", "largest causes of the step", "sent, GB a GPU", "peak, GB"),
    *("sampled at once", "texts a forward"),
)


def details() -> str:
    """A folded table per policy."""
    parts = []
    for policy in POLICIES:
        rows = []
        for name in LAYOUTS:
            for gpus in GPUS:
                for plan in plans(policy, gpus):
                    if plan.layout == name and plan.fits:
                        rows.append(detail(plan))
        table = markdown(DETAILS, rows)
        parts.append(f"<details><summary>{policy.name}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def detail(plan: Plan) -> list[str]:
    """A line of `DETAILS`."""
    if not plan.fits:
        return [plan.layout, str(plan.gpus), f"{plan.missing / 1e9:,.0f} GB short", *[""] * (len(DETAILS) - 3)]
    phases = [figure(sum(phase.values())) for phase in (plan.generate, plan.score, plan.train)]
    causes = sorted(plan.step.items(), key=lambda pair: -pair[1])[:3]
    shown = ", ".join(f"{name} {seconds / plan.seconds:.0%}" for name, seconds in causes)
    divided = f" ({plan.rollout} GPUs sample, {plan.tensor} a copy)" if plan.rollout else ""
    forward = f"{plan.forward_rows}{' recomputed' if plan.checkpointing else ''}"
    peak = f"{sum(plan.memory.values()) / 1e9:.1f}"
    sent = figure(plan.sent / 1e9)
    return [plan.layout, str(plan.gpus), figure(plan.seconds), *phases, shown, sent, peak, f"{plan.at_once}{divided}", forward]


def memory() -> str:
    """What stays on a GPU, in GB, and what phases take beside it."""
    head = ("policy", "DDP", "DDP, LoRA", "FSDP, 8", "FSDP, 64", "FSDP, 512", "FSDP here while it scores, more", "split of 64: 32 train")
    rows = []
    for policy in POLICIES:
        cells = [resident(policy, 1, 1.0), resident(policy, 1, 0.005), *(resident(policy, gpus, 1.0) for gpus in (8, 64, 512))]
        cells += [scoring_memory(policy, RUN, 1, 8, shortened=False)["copies for products"], sum(training_state(policy, 32).values())]
        cells += [SHORT * (2 * policy.parameters + judge_of(policy).parameters) / 8]
        cells += [sum(training_state(policy, shards).values()) for shards in (1, 64)]
        rows.append([policy.name, *(figure(cell / 1e9) for cell in cells)])
    return markdown((*head, "others sample, 8 a copy", "a critic of its own: DDP", "FSDP, 64"), rows)


def resident(policy: Transformer, shards: int, trained: float) -> float:
    """Bytes that weights, gradients, moments, reference, reward model and the copy to sample from take on a GPU."""
    state = sum(training_state(policy, shards, trained).values()) + SHORT * judge_of(policy).parameters / shards
    if trained < 1.0:
        return state
    return state + FULL * policy.parameters / shards + (SHORT * policy.parameters if shards == 1 else 0.0)


DOUBLINGS = tuple(2**power for power in range(11))
WORTH = 1.5


def stops() -> str:
    """For each layout: the fewest GPUs, the last doubling that makes a step `WORTH` times as fast, and what bounds the next."""
    rows = []
    for policy in POLICIES:
        for name in LAYOUTS:
            found = [plan for gpus in DOUBLINGS for plan in plans(policy, gpus) if plan.layout == name and plan.fits]
            if not found:
                rows.append([policy.name, name, "none", "", "memory"])
                continue
            last, after = next((one, two) for one, two in pairwise(found) if one.seconds / two.seconds < WORTH)
            gained = f"{after.bottleneck} ({last.seconds / after.seconds:.2f} times)"
            rows.append([policy.name, name, str(found[0].gpus), f"{last.gpus:,}", gained])
    return markdown(("policy", "layout", "fewest GPUs", f"doubled as long as that gives {WORTH}", "what bounds the next doubling"), rows)


SFT_BATCH, SFT_TOKENS, SFT_ANSWER = 512, 512, 256


def training() -> str:
    """SFT and reward models with Lightning: 512 rows (texts or pairs) to a step."""
    sft = Run(SFT_BATCH, prompt=SFT_TOKENS - SFT_ANSWER, answer=SFT_ANSWER, epochs=1, minibatches=1)
    pairs = replace(sft, answers=2 * SFT_BATCH)
    rows = []
    for model in POLICIES:
        for gpus in GPUS:
            cells = []
            for run, outputs, unit in ((sft, SFT_ANSWER, SFT_TOKENS), (pairs, 0.0, 0.5)):
                for sharded in (False, True):
                    if sharded and gpus == 1:
                        cells.append("")
                        continue
                    plan = training_step(H100, model, run, gpus, sharded=sharded, outputs=outputs)
                    amount = f"{figure(run.answers * unit / plan.seconds / gpus)} {plan.bottleneck}" if plan.fits else ""
                    cells.append(amount or f"memory, {plan.missing / 1e9:,.0f} GB short")
            rows.append([model.name, str(gpus), *cells])
    return markdown(("model", "GPUs", "SFT, tokens/s/GPU: ddp", "fsdp", "reward model, pairs/s/GPU: ddp", "fsdp"), rows)


# --- document and picture ------------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "assumptions": assumptions,
    "policies": policies,
    "speeds": speeds,
    "details": details,
    "memory": memory,
    "stops": stops,
    "training": training,
    "check": lambda: markdown(("size", "answers", "tokens", "generate, s", "score, s", "train, s", "together", ""), speed_rows()),
    "check_memory": lambda: markdown(("size", "packages and three models, MiB", "on top of them at the peak, MiB"), memory_rows()),
}


def regenerate(text: str) -> str:
    """A document with every table made anew."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- plan:{match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- /plan -->"

    return re.sub(r"<!-- plan:(\w+) -->.*?<!-- /plan -->", replaced, text, flags=re.DOTALL)


COLOURS = {
    "DDP": "#4c72b0",
    "DDP, LoRA": "#64b5cd",
    "FSDP here": "#937860",
    "FSDP": "#dd8452",
    "FSDP in nodes": "#c44e52",
    "split": "#55a868",
}
PER_GPU = 16


def draw(path: Path) -> None:
    """Tokens/s/GPU against GPUs: above with the same answers for all, below with `PER_GPU` answers for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 6.2), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(2, len(POLICIES), sharex=True)
    for column, policy in enumerate(POLICIES):
        for row, weak in enumerate((False, True)):
            draw_panel(panels[row][column], policy, weak)
        panels[0][column].set_title(policy.name)
        panels[1][column].set_xlabel("GPUs")
    panels[0][0].set_ylabel(f"tokens/s/GPU\n{RUN.answers:,} answers to a step")
    panels[1][0].set_ylabel(f"tokens/s/GPU\n{PER_GPU} answers a GPU to a step")
    found: dict[str, Any] = {}
    for panel in panels[0]:
        found |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    names = [name for name in LAYOUTS if name in found]
    picture.legend([found[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False)
    picture.savefig(path, dpi=80)


def draw_panel(axes: Axes, policy: Transformer, weak: bool) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for gpus in DOUBLINGS[:10]:
        run = replace(RUN, answers=PER_GPU * gpus) if weak else RUN
        for plan in plans(policy, gpus, run):
            if plan.fits:
                lines.setdefault(plan.layout, []).append((gpus, speed(plan, run)))
    for name, points in lines.items():
        colour, dashed = COLOURS[name.split(", one")[0]], "one step" in name
        axes.plot(*zip(*points, strict=True), color=colour, linestyle="--" if dashed else "-", marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the document is not current")
    parser.add_argument("--picture", action="store_true", help="draw the picture, too")
    parser.add_argument("--policy", choices=[model.name for model in POLICIES], help="print one case instead")
    parser.add_argument("--gpus", type=int, default=8)
    for name in ("answers", "prompt", "answer", "longest", "epochs", "minibatches"):
        parser.add_argument(f"--{name}", type=int, default=getattr(RUN, name))
    options = parser.parse_args(argv)
    if options.policy:
        policy = next(model for model in POLICIES if model.name == options.policy)
        run = replace(RUN, **{name: getattr(options, name) for name in ("answers", "prompt", "answer", "longest", "epochs", "minibatches")})
        rows = [
            [*detail(plan), figure(speed(plan, run)) if plan.fits else "", plan.bottleneck] for plan in plans(policy, options.gpus, run)
        ]
        print(markdown((*DETAILS, "tokens/s/GPU", "bound by"), rows))
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    current = regenerate(text)
    if options.check:
        if current != text:
            print(f"{DOCUMENT.relative_to(ROOT)} is not current; make docs regenerates it")
        return int(current != text)
    DOCUMENT.write_text(current, encoding="utf-8")
    if options.picture:
        draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
