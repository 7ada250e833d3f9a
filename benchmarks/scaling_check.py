"""What the formulas of `benchmarks/scaling_model.py` give for PPO steps that were measured on two CPU cores, beside the measurements."""

from __future__ import annotations

from benchmarks.scaling_model import FULL, Device, Run, Transformer, decode, forwards, update

CPU = Device(
    name="two cores, float32",
    peak=250e9,
    generate_share=0.3,
    score_share=0.95,
    train_share=1.0,
    bandwidth=20e9,
    bandwidth_share=1.0,
    states=4e9,
    memory=24e9,
    unusable=0.0,
    launch=1e-3,
    replay=1.4e-3,
    whole_cache=False,
)
CPU_SIZES = {
    name: Transformer(name, hidden, layers, heads, heads, 4 * hidden, 4096, tied=True, positions=512)
    for name, (hidden, layers, heads) in {"xs": (128, 2, 4), "s": (256, 8, 8), "m": (512, 12, 8)}.items()
}
CPU_TOKENS = 2048
PROMPT = 34.5
"""Tokens of a prompt of `benchmarks/synthetic.py`, on average."""
FITTED = {("s", 64, 64), ("m", 64, 64)}
MEASURED = (
    ("s", 16, 64, 1.10, 0.35, 0.60),
    ("s", 32, 64, 1.41, 0.68, 1.12),
    ("s", 64, 64, 2.07, 1.27, 2.47),
    ("s", 128, 64, 3.32, 2.50, 4.56),
    ("s", 256, 64, 6.10, 4.92, 9.37),
    ("s", 64, 16, 0.80, 0.68, 1.23),
    ("s", 64, 32, 1.20, 0.90, 1.54),
    ("s", 64, 128, 4.03, 2.12, 4.07),
    ("s", 64, 256, 7.82, 4.00, 7.87),
    ("xs", 64, 64, 0.54, 0.21, 0.35),
    ("m", 64, 64, 6.31, 5.44, 10.19),
)
"""Size, answers, tokens of each, seconds of generate, score, train: "How it grows" in benchmarks/RESULTS.md."""


def cpu_seconds(size: str, answers: int, tokens: int) -> tuple[float, float, float]:
    """What the formulas give for one process of `benchmarks/growth.py`."""
    model = CPU_SIZES[size]
    run = Run(answers, PROMPT, tokens, tokens, 1, max(1, answers // 16), mixed=False, rescored=False, forward_tokens=CPU_TOKENS)
    score = [forwards(CPU, model, run, answers, outputs) for outputs in (tokens, 0)]
    phases = (decode(CPU, model, run, answers, answers), *score, update(CPU, model, run, 1, 16, False))
    generate, reference, judge, train = (sum(phase.values()) for phase in phases)
    return generate, reference + judge, train


def speed_rows() -> list[list[str]]:
    """Lines of the table of seconds."""
    rows = []
    for size, answers, tokens, *measured in MEASURED:
        said = cpu_seconds(size, answers, tokens)
        cells = [f"{one:.2f} / {two:.2f} ({one / two - 1:+.0%})" for one, two in zip(said, measured, strict=True)]
        whole = f"{sum(said) / sum(measured) - 1:+.0%}"
        rows.append([size, str(answers), str(tokens), *cells, whole, "fitted" if (size, answers, tokens) in FITTED else "foretold"])
    return rows


MEASURED_MEMORY = {"xs": (385, 165), "s": (468, 472), "m": (850, 1450)}
"""Size -> MiB before the first iteration, and on top of them at the peak: the same place."""


def memory_rows() -> list[list[str]]:
    """Lines of the table of memory."""
    rows = []
    base = MEASURED_MEMORY["xs"][0] - 3 * FULL * CPU_SIZES["xs"].parameters / 2**20
    for size, (start, on_top) in MEASURED_MEMORY.items():
        model = CPU_SIZES[size]
        tokens = 16 * (PROMPT + 64)
        models = base + 3 * FULL * model.parameters / 2**20
        update_bytes = 3 * FULL * model.parameters + model.kept(tokens, FULL, False) + 3 * FULL * 16 * 64 * model.vocabulary
        more = update_bytes / 2**20
        rows.append([size, f"{models:.0f} / {start} ({models / start - 1:+.0%})", f"{more:.0f} / {on_top} ({more / on_top - 1:+.0%})"])
    return rows
