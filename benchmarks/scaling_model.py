"""Seconds, memory and network traffic of a PPO step on groups of GPUs, by counting: products, bytes read, bytes sent, launches.

Everything is plain arithmetic over four records: `Device` (a GPU, its links and what share of each is reached), `Transformer` (sizes),
`Run` (a PPO step: answers, lengths, epochs) and `Plan` (what comes out). `benchmarks/scaling_plan.py` makes tables of it; docs/scaling.md
says what is assumed. Units: seconds, bytes, FLOP; P parameters, D hidden size, L layers, V vocabulary, S tokens of prompt and answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

Seconds = Mapping[str, float]
"""By cause: products; states (activations written and read); weights (read by decoding, cast for products); cache (keys and values read by
decoding); launches; optimizer; network; idle (GPUs without an answer in a minibatch); waiting (of one group for the other)."""

CAUSES = ("products", "states", "weights", "cache", "launches", "optimizer", "network", "idle", "waiting")
SHORT, FULL = 2, 4
"""Bytes of a bfloat16 and of a float32 number."""
ADAM_TRAFFIC = 28
"""Bytes that AdamW moves per parameter: weight and two moments read and written, gradient read."""
LOGITS = 10
"""Bytes per logit in an update: bfloat16, its float32 copy, and the gradient."""
FORWARD_TOKENS = 16384
"""Tokens of one forward at most: `common.chunks.CHUNK_TOKENS` on a GPU."""


@dataclass(frozen=True)
class Device:
    """A GPU (or the CPU of the check), with what joins it to others.

    peak              FLOP/s of dense products
    generate_share    of `peak` that products reach while decoding; `score_share`: in forwards over whole texts; `train_share`: in
                      forwards and backwards
    bandwidth         bytes/s of its memory; `bandwidth_share` of it is reached while decoding
    states            bytes/s at which activations are written and read
    memory, unusable  bytes; what the driver, communication buffers and fragmentation take of them
    launch, replay    seconds that a layer costs at least: in a forward over whole texts, in a decoding step
    per_node          GPUs joined by `link`; others by `network` (bytes/s of each GPU each way, as collectives reach them)
    protocols         (base, link, network, share): a collective costs `base` seconds, `link` or `network` seconds per step of its ring
                      or tree, and reaches `share` of the bandwidth; the quickest one is taken
    whole_cache       decoding reads the whole buffer of keys and values, not only what is filled
    """

    name: str
    peak: float
    generate_share: float
    score_share: float
    train_share: float
    bandwidth: float
    bandwidth_share: float
    states: float
    memory: float
    unusable: float
    launch: float
    replay: float
    per_node: int = 1
    link: float = math.inf
    network: float = math.inf
    protocols: Sequence[tuple[float, float, float, float]] = ((0.0, 0.0, 0.0, 1.0),)
    whole_cache: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)

    def gather(self, size: float, members: int) -> float:
        """Seconds to gather `size` bytes of which each member holds a part, or to sum them into such parts, along a ring."""
        if members == 1:
            return 0.0
        nodes = -(-members // self.per_node)
        sent = size * (members - 1) / members
        return min(
            base + (members - nodes) * link + (nodes - 1) * network + sent / (share * self._bus(members))
            for base, link, network, share in self.protocols
        )

    def all_reduce(self, size: float, members: int) -> float:
        """Seconds to sum `size` bytes over the members: twice a gather's traffic, the latency of a ring or a tree."""
        if members == 1:
            return 0.0
        nodes = -(-members // self.per_node)
        sent = 2 * size * (members - 1) / members
        depth = math.ceil(math.log2(nodes))
        return min(
            base
            + min(2 * (members - nodes) * link + 2 * (nodes - 1) * network, 2 * (members / nodes - 1) * link + 2 * depth * network)
            + sent / (share * self._bus(members))
            for base, link, network, share in self.protocols
        )

    def _bus(self, members: int) -> float:
        """Bytes/s that each member sends: between nodes, all GPUs of a node share the traffic that leaves it."""
        if members <= self.per_node:
            return self.link
        return min(self.link, self.per_node * self.network)


@dataclass(frozen=True)
class Transformer:
    """A causal transformer; norms and biases count nothing. `gated`: three matrices in the feed-forward part, else two."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    gated: bool = False
    tied: bool = False
    positions: int = 0

    @property
    def kv_hidden(self) -> int:
        return self.hidden * self.kv_heads // self.heads

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.hidden * (self.hidden + self.kv_hidden)
        return attention + (3 if self.gated else 2) * self.hidden * self.feed_forward

    @property
    def trunk(self) -> int:
        return self.layers * self.layer

    @property
    def parameters(self) -> int:
        return self.trunk + self.hidden * ((1 if self.tied else 2) * self.vocabulary + self.positions)

    @property
    def read(self) -> int:
        """Parameters that a decoding step reads: all but the embedding's rows."""
        return self.trunk + self.hidden * self.vocabulary

    def forward(self, texts: float, tokens: float, outputs: float) -> float:
        """FLOP of a forward over texts of so many tokens each, with logits at `outputs` places of each."""
        pairs = tokens * (tokens + 1) / 2
        return texts * (2 * self.trunk * tokens + 4 * self.hidden * self.layers * pairs + 2 * self.hidden * self.vocabulary * outputs)

    def step(self, context: float) -> float:
        """FLOP of decoding one token that sees `context` others."""
        return 2 * self.read + 4 * self.hidden * self.layers * context

    def cache(self, bytes_each: int) -> float:
        """Bytes of keys and values per token."""
        return 2 * self.layers * self.kv_hidden * bytes_each

    def traffic(self, tokens: float, bytes_each: int) -> float:
        """Bytes of activations that a forward moves; what is kept for a gradient is written and read, which doubles it."""
        return self.kept(tokens, bytes_each, checkpointing=False)

    def kept(self, tokens: float, bytes_each: int, checkpointing: bool) -> float:
        """Bytes kept for the backward pass: all that a layer's products and norms read, or with checkpointing their inputs alone.

        Norms' inputs and outputs, queries, keys, values, attention's output, the feed-forward part's states around its activation; no
        attention scores. With checkpointing one layer is whole again at a time.
        """
        whole = bytes_each * (6 * self.hidden + 2 * self.kv_hidden + (4 if self.gated else 2) * self.feed_forward)
        if checkpointing:
            return tokens * (self.layers * bytes_each * self.hidden + whole)
        return tokens * self.layers * whole


@dataclass(frozen=True)
class Run:
    """A PPO step, of all GPUs together.

    answers, prompt, answer, longest   how many answers; tokens of a prompt, of an answer on average, of the longest answer
    epochs, minibatches                passes over the answers, optimizer steps in each
    mixed                              products in bfloat16 over float32 weights (`mixed_precision: bf16`), else all in float32
    rescored                           the policy's log-probabilities are computed again before the update
    forward_tokens                     tokens of a forward at most
    """

    answers: int = 1024
    prompt: float = 256
    answer: float = 256
    longest: float = 512
    epochs: int = 4
    minibatches: int = 4
    mixed: bool = True
    rescored: bool = True
    forward_tokens: int = FORWARD_TOKENS

    @property
    def tokens(self) -> float:
        return self.prompt + self.answer

    @property
    def short(self) -> int:
        """Bytes of a number in products."""
        return SHORT if self.mixed else FULL


@dataclass(frozen=True)
class Plan:
    """A layout's step. `missing`: bytes that the device lacks, where nothing fits (all else is then of no meaning).

    generate, score, train, sync   seconds by cause (in a split, of the GPUs that do it); `step`: of the whole, averaged over GPUs
    seconds                        of the step
    sent                           bytes that a GPU sends in a step, the mean over GPUs
    memory                         bytes of a GPU at its peak, by part
    at_once                        answers that a GPU (or group of `tensor` GPUs) samples at once
    forward_rows, checkpointing    the settings of the update that were quickest of those that fit
    rollout, tensor                in a split: GPUs that sample, and how many share a copy of the weights
    """

    layout: str
    gpus: int
    missing: float = 0.0
    generate: Seconds = field(default_factory=dict)
    score: Seconds = field(default_factory=dict)
    train: Seconds = field(default_factory=dict)
    sync: float = 0.0
    step: Seconds = field(default_factory=dict)
    seconds: float = math.inf
    sent: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)
    at_once: int = 0
    forward_rows: int = 0
    checkpointing: bool = False
    rollout: int = 0
    tensor: int = 1

    @property
    def fits(self) -> bool:
        return self.missing == 0

    @property
    def bottleneck(self) -> str:
        """What takes most: `batch` where it is what more answers per GPU would share out (weights read, launches, idle GPUs)."""
        if not self.fits:
            return "memory"
        causes = {cause: self.step.get(cause, 0.0) for cause in CAUSES}
        batch = causes.pop("weights") + causes.pop("launches") + causes.pop("idle")
        causes["batch"] = batch
        return max(causes, key=lambda cause: causes[cause])


def total(*parts: Seconds, weights: Sequence[float] | None = None) -> dict[str, float]:
    """Sums by cause, each part times its weight."""
    found: dict[str, float] = {}
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        for cause, seconds in part.items():
            found[cause] = found.get(cause, 0.0) + weight * seconds
    return found


# --- phases of one GPU, or of `tensor` GPUs that share a copy of the weights ----------------------------------------------------------


def decode(
    device: Device, model: Transformer, run: Run, rows: int, at_once: int, *, tensor: int = 1, collected: int = 1, graphs: bool = True
) -> dict[str, float]:
    """Sample `rows` answers, `at_once` of them together.

    collected: GPUs that hold a part of each layer and send it for every token. graphs: a step is launched as one.
    """
    times = dict.fromkeys(("products", "states", "weights", "cache", "launches", "network"), 0.0)
    waves = [at_once] * (rows // at_once) + ([rows % at_once] if rows % at_once else [])
    steps = max(0.0, run.longest - 1)
    reading = tensor * device.bandwidth * device.bandwidth_share
    context = run.prompt + (run.longest if device.whole_cache else run.longest / 2)
    for wave in waves:
        prompts, each = (model.traffic(wave * tokens, run.short) / device.states / tensor for tokens in (run.prompt, 1))
        times["products"] += model.forward(wave, run.prompt, 1) / tensor / (device.peak * device.score_share)
        times["states"] += prompts + steps * each
        times["launches"] += model.layers * (device.launch + steps * (device.replay if graphs else device.launch))
        products = wave * model.step(run.prompt + run.longest / 2) / tensor / (device.peak * device.generate_share)
        weights, cache = run.short * model.read / reading, wave * context * model.cache(run.short) / reading
        if products > weights + cache:
            times["products"] += steps * products
        else:
            times["weights"] += steps * weights
            times["cache"] += steps * cache
        summed = [2 * model.layers * device.all_reduce(wave * tokens * model.hidden * run.short, tensor) for tokens in (run.prompt, 1)]
        times["network"] += summed[0] + steps * summed[1]
        gathers = model.layers * device.gather(run.short * model.read / model.layers, collected)
        times["network"] += steps * max(0.0, gathers - max(products, weights + cache))
    return times


def forwards(
    device: Device, model: Transformer, run: Run, rows: int, outputs: float, *, shards: int = 1, tensor: int = 1, cast: bool = False
) -> dict[str, float]:
    """Forwards over `rows` whole texts without gradient. `shards`: GPUs that hold a part each; `cast`: weights are float32."""
    chunks = max(1, math.ceil(rows * run.tokens / run.forward_tokens))
    products = model.forward(rows, run.tokens, outputs) / tensor / (device.peak * device.score_share)
    casting = chunks * 6 * model.parameters / (device.bandwidth * device.bandwidth_share) if cast and run.mixed and shards == 1 else 0.0
    gathering = chunks * model.layers * device.gather(run.short * model.trunk / model.layers, shards)
    reducing = chunks * 2 * model.layers * device.all_reduce(rows / chunks * run.tokens * model.hidden * run.short, tensor)
    return {
        "products": products,
        "states": model.traffic(rows * run.tokens, run.short) / tensor / device.states,
        "weights": casting,
        "launches": chunks * model.layers * device.launch,
        "network": max(0.0, gathering - products) + reducing,
    }


def update(
    device: Device,
    model: Transformer,
    run: Run,
    gpus: int,
    forward_rows: int,
    checkpointing: bool,
    *,
    shards: int = 1,
    trained: float = 1.0,
    overlapped: bool = False,
    outputs: float | None = None,
    shortened: bool = True,
) -> dict[str, float]:
    """All optimizer steps of a PPO step on `gpus` GPUs, of which `shards` together hold one copy.

    `trained`: share of the parameters. `overlapped`: gradients are summed while the backward pass runs. `outputs`: places with logits
    of each text (default: the answer's). `shortened`: parts are collected in the type of the products, else in float32 and then cast.
    """
    answers = math.ceil(run.answers / run.minibatches)
    rows = math.ceil(answers / gpus)
    chunks = math.ceil(rows / forward_rows)
    used = answers / (gpus * rows)
    passes = (3 if trained == 1.0 else 2) + checkpointing
    forward = model.forward(rows, run.tokens, run.answer if outputs is None else outputs)
    products = passes * forward / (device.peak * device.train_share)
    size = trained * model.parameters
    casts = run.mixed and trained == 1.0 and (shards == 1 or not shortened)
    casting = chunks * 6 * model.parameters / (device.bandwidth * device.bandwidth_share) if casts else 0.0
    reduced = 0.0
    if gpus > shards:
        reduced = device.all_reduce(FULL * size, gpus) if shards == 1 else _between_nodes(device, size, gpus, shards)
    if shards > 1:
        each = model.trunk / model.layers
        gathers = 2 * device.gather((run.short if shortened else FULL) * each, shards) + device.gather(FULL * each, shards)
        network = max(0.0, chunks * model.layers * gathers + reduced - products)
    else:
        network = max(0.0, reduced - products * 2 / 3) if overlapped else reduced
    steps = run.epochs * run.minibatches
    return {
        "products": steps * products * used,
        "states": steps * 2 * passes * model.traffic(rows * run.tokens, run.short) / device.states,
        "idle": steps * products * (1 - used),
        "weights": steps * casting,
        "launches": steps * chunks * passes * model.layers * device.launch,
        "optimizer": steps * ADAM_TRAFFIC * size / shards / (device.bandwidth * device.bandwidth_share),
        "network": steps * network,
    }


def _between_nodes(device: Device, size: float, gpus: int, shards: int) -> float:
    """Seconds to sum the gradients of one part over its `gpus / shards` copies, a GPU in each node at the network's rate."""
    across = replace(device, per_node=1, link=device.network)
    return across.all_reduce(FULL * size / shards, gpus // shards)


# --- memory --------------------------------------------------------------------------------------------------------------------------


def training_state(model: Transformer, shards: int, trained: float = 1.0) -> dict[str, float]:
    """Weights, gradients and Adam's moments, float32 where they train; bfloat16 weights under adapters."""
    size = model.parameters / shards
    weights = FULL * size if trained == 1.0 else SHORT * size + FULL * trained * size
    return {"weights": weights, "gradients": FULL * trained * size, "Adam": 2 * FULL * trained * size}


def sampling_memory(model: Transformer, run: Run, rows: int, tensor: int = 1) -> float:
    """Keys and values of `rows` answers: those of the prompts, and the buffer that prompts and answers fill."""
    return rows * (2 * run.prompt + run.longest) * model.cache(run.short) / tensor


def most_rows(model: Transformer, run: Run, rows: int, room: float, tensor: int = 1) -> int:
    """How many of `rows` answers can be sampled at once in `room` bytes."""
    return min(rows, int(room // sampling_memory(model, run, 1, tensor)))


def update_memory(
    model: Transformer, run: Run, rows: int, checkpointing: bool, shards: int, trained: float, outputs: float, shortened: bool = True
) -> dict[str, float]:
    """What a forward and backward over `rows` texts takes beside what stays: states, logits, weights as products read them.

    Casts of weights stay until the backward pass has read them; layers that are collected in the products' type are collected twice.
    """
    casts = SHORT * model.parameters if run.mixed and trained == 1.0 and (shards == 1 or not shortened) else 0.0
    ends = model.hidden * model.vocabulary
    each = run.short if shortened else FULL
    collected = 2 * (each + FULL) * model.layer + (each * ends if shortened else 2 * FULL * ends)
    return {
        "states": model.kept(rows * run.tokens, run.short, checkpointing),
        "logits": LOGITS * rows * outputs * model.vocabulary,
        "copies for products": casts + (collected if shards > 1 else 0.0),
    }


def scoring_memory(
    model: Transformer, run: Run, rows: int, shards: int, adapters: bool = False, shortened: bool = True
) -> dict[str, float]:
    """What forwards of policy or reference over up to `rows` texts take beside what stays; weights in float32 are collected whole.

    Casts of the policy's weights are kept over a forward, those of the reference's, which do not train, are not.
    """
    texts = min(rows, max(1, int(run.forward_tokens // run.tokens)))
    casts = SHORT * model.parameters if run.mixed and run.rescored and not adapters and (shards == 1 or not shortened) else 0.0
    collected = 2 * run.short * model.layer if shortened else FULL * model.parameters
    return {
        "logits": (LOGITS - FULL) * texts * run.answer * model.vocabulary,
        "copies for products": casts + (collected if shards > 1 else 0.0),
    }


def update_settings(run: Run, gpus: int) -> Iterator[tuple[int, bool]]:
    """(rows of a forward, checkpointing) to choose from."""
    rows = math.ceil(math.ceil(run.answers / run.minibatches) / gpus)
    while rows >= 1:
        if rows * run.tokens <= run.forward_tokens or rows == 1:
            yield rows, False
            yield rows, True
        rows = rows // 2 if rows > 1 else 0


def best_update(
    device: Device,
    model: Transformer,
    run: Run,
    gpus: int,
    resident: float,
    *,
    shards: int = 1,
    trained: float = 1.0,
    overlapped: bool = False,
    outputs: float | None = None,
    shortened: bool = True,
) -> tuple[dict[str, float], dict[str, float], int, bool] | float:
    """(seconds, memory, rows of a forward, checkpointing) of the quickest update that fits; bytes that are missing where none does."""
    found: list[tuple[float, tuple[dict[str, float], dict[str, float], int, bool]]] = []
    missing = math.inf
    room = device.memory - device.unusable - resident
    places = run.answer if outputs is None else outputs
    for rows, checkpointing in update_settings(run, gpus):
        memory = update_memory(model, run, rows, checkpointing, shards, trained, places, shortened)
        missing = min(missing, sum(memory.values()) - room)
        if sum(memory.values()) <= room:
            options = {"shards": shards, "trained": trained, "overlapped": overlapped, "outputs": outputs, "shortened": shortened}
            times = update(device, model, run, gpus, rows, checkpointing, **options)  # type: ignore[arg-type]
            found.append((sum(times.values()), (times, memory, rows, checkpointing)))
    return min(found, key=lambda pair: pair[0])[1] if found else missing


# --- layouts -------------------------------------------------------------------------------------------------------------------------

Layout = Callable[[Device, Transformer, Transformer, Run, int], Plan]
"""(device, policy, reward model, run, GPUs) -> its plan."""


def together(
    device: Device,
    policy: Transformer,
    judge: Transformer,
    run: Run,
    gpus: int,
    *,
    name: str,
    shards: int = 1,
    trained: float = 1.0,
    here: bool = False,
) -> Plan:
    """Every GPU samples, scores and trains on its part of the answers; `shards` GPUs together hold one copy of each network.

    `here`: as `common/launch/fsdp.py` shards. Weights are collected in float32 and cast, for scoring whole and at once; decoding steps
    are launched kernel by kernel; the copy to sample from lies in parts of its own.
    """
    state = training_state(policy, shards, trained)
    adapters = trained < 1.0
    state["reference"] = 0.0 if adapters else FULL * policy.parameters / shards
    state["reward model"] = run.short * judge.parameters / shards
    sampler = run.short * policy.parameters
    if run.mixed and not adapters and (shards == 1 or here):
        state["copy to sample from"] = sampler / shards
    resident = sum(state.values())
    room = device.memory - device.unusable - resident
    rows = math.ceil(run.answers / gpus)
    # Sampling with the whole policy on each GPU where there is room for one answer, else with weights collected for every token.
    whole = shards > 1 and (here or room - sampler >= sampling_memory(policy, run, 1))
    spare = room - (sampler if whole else 0.0 if shards == 1 else 2 * run.short * policy.layer)
    at_once = most_rows(policy, run, rows, max(0.0, spare))
    scoring = scoring_memory(policy, run, rows, shards, adapters, shortened=not here)
    chosen = best_update(device, policy, run, gpus, resident, shards=shards, trained=trained, shortened=not here)
    missing = max(sampling_memory(policy, run, 1) - spare, sum(scoring.values()) - room, chosen if isinstance(chosen, float) else 0.0)
    if missing > 0 or isinstance(chosen, float):
        return Plan(name, gpus, missing=missing)
    train, needed, forward_rows, checkpointing = chosen
    generate = decode(device, policy, run, rows, at_once, collected=1 if whole else shards, graphs=not here)
    if whole:
        generate["network"] += policy.layers * device.gather(sampler / policy.layers, shards)
    long = FULL if not adapters else run.short
    networks = [(policy, run.answer, long), (judge, 0.0, run.short), *([(policy, run.answer, long)] if run.rescored else [])]
    score = total(
        *(
            forwards(device, model, run, rows, outputs, shards=1 if here else shards, cast=size > run.short)
            for model, outputs, size in networks
        )
    )
    if here:
        score["network"] += sum(model.layers * device.gather(size * model.parameters / model.layers, shards) for model, _, size in networks)
    step = total(generate, score, train)
    sampling = {"keys and values": sampling_memory(policy, run, at_once), **({"copy to sample from": sampler} if whole else {})}
    extra = max(sampling, scoring, needed, key=lambda parts: sum(parts.values()))
    return Plan(
        name,
        gpus,
        generate=generate,
        score=score,
        train=train,
        step=step,
        seconds=sum(step.values()),
        sent=_sent_together(policy, judge, run, gpus, shards, trained, forward_rows, rows, whole, here),
        memory=total(state, extra),
        at_once=at_once,
        forward_rows=forward_rows,
        checkpointing=checkpointing,
    )


def _sent_together(
    policy: Transformer,
    judge: Transformer,
    run: Run,
    gpus: int,
    shards: int,
    trained: float,
    forward_rows: int,
    rows: int,
    whole: bool,
    here: bool,
) -> float:
    """Bytes that each GPU sends in a step."""
    steps = run.epochs * run.minibatches
    gradients = 2 * FULL * trained * policy.parameters / shards
    if shards == 1:
        return steps * gradients * (gpus - 1) / gpus
    part = (shards - 1) / shards
    copies = gpus // shards
    chunks = math.ceil(math.ceil(math.ceil(run.answers / run.minibatches) / gpus) / forward_rows)
    scorings = 1 if here else max(1, math.ceil(rows * run.tokens / run.forward_tokens))
    collected = FULL if here else run.short
    trained_bytes = steps * chunks * (2 * collected + FULL) * policy.trunk * part + steps * gradients * (copies - 1) / copies
    scored = scorings * (collected * (1 + run.rescored) * policy.trunk + run.short * judge.trunk) * part
    sampled = run.short * policy.parameters * part * (1 if whole else max(0.0, run.longest - 1))
    return trained_bytes + scored + sampled


def ddp(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int) -> Plan:
    """A copy of everything on every GPU; gradients are summed after the backward pass."""
    return together(device, policy, judge, run, gpus, name="DDP")


def lora(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int) -> Plan:
    """DDP over bfloat16 weights of which adapters of 0.5 % train; the reference shares the weights."""
    return together(device, policy, judge, run, gpus, name="DDP, LoRA", trained=0.005)


def fsdp(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int) -> Plan:
    """ZeRO-3: weights, gradients, moments, reference and reward model in as many parts as there are GPUs."""
    return together(device, policy, judge, run, gpus, name="FSDP", shards=gpus)


def fsdp_here(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int) -> Plan:
    """FSDP as `rlhf/configs/accelerate/fsdp.yaml` starts it now."""
    return together(device, policy, judge, run, gpus, name="FSDP here", shards=gpus, here=True)


def hybrid(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int) -> Plan:
    """FSDP within each node, whose GPUs hold one copy together; gradients are summed over nodes."""
    return together(device, policy, judge, run, gpus, name="FSDP in nodes", shards=min(gpus, device.per_node))


def split(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int, *, behind: bool = False) -> Plan:
    """Some GPUs sample and score, the others train (FSDP); the quickest division. `behind`: both at once, on answers one step old."""
    name = "split, one step behind" if behind else "split"
    best = Plan(name, gpus, missing=math.inf)
    for rollout, tensor in _divisions(device, gpus):
        plan = _divided(device, policy, judge, run, gpus, rollout, tensor, behind, name)
        if (plan.fits, -plan.seconds if plan.fits else -plan.missing) > (best.fits, -best.seconds if best.fits else -best.missing):
            best = plan
    return best


def behind(device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int) -> Plan:
    return split(device, policy, judge, run, gpus, behind=True)


def _divisions(device: Device, gpus: int) -> Iterator[tuple[int, int]]:
    """(GPUs that sample, GPUs that share a copy there); whole nodes where there are several."""
    unit = device.per_node if gpus > device.per_node else 1
    shares = sorted({max(unit, round(gpus * eighth / 8 / unit) * unit) for eighth in range(1, 8)})
    for rollout in shares:
        for tensor in (1, 2, 4, 8):
            if rollout < gpus and rollout % tensor == 0 and tensor <= device.per_node:
                yield rollout, tensor


def _divided(
    device: Device, policy: Transformer, judge: Transformer, run: Run, gpus: int, rollout: int, tensor: int, behind: bool, name: str
) -> Plan:
    trainers = gpus - rollout
    # 1. the GPUs that sample and score
    inference = run.short * (2 * policy.parameters + judge.parameters) / tensor
    rows = math.ceil(run.answers / (rollout // tensor))
    room = device.memory - device.unusable - inference
    at_once = most_rows(policy, run, rows, room, tensor)
    # 2. those that train
    shards = min((trainers, min(trainers, device.per_node)), key=lambda count: _training_seconds(device, policy, run, trainers, count))
    state = training_state(policy, shards)
    chosen = best_update(device, policy, run, trainers, sum(state.values()), shards=shards)
    if at_once < 1 or isinstance(chosen, float):
        lacking = sampling_memory(policy, run, 1, tensor) - room if at_once < 1 else 0.0
        return Plan(name, gpus, missing=max(lacking, chosen if isinstance(chosen, float) else 0.0))
    update_seconds, needed, forward_rows, checkpointing = chosen
    generate = decode(device, policy, run, rows, at_once, tensor=tensor)
    score = total(forwards(device, policy, run, rows, run.answer, tensor=tensor), forwards(device, judge, run, rows, 0, tensor=tensor))
    rescore = forwards(device, policy, run, math.ceil(run.answers / trainers), run.answer, shards=shards) if run.rescored else {}
    train = total(rescore, update_seconds)
    # 3. new weights for those that sample
    between = device.link if gpus <= device.per_node else device.network
    sync = run.short * policy.parameters / tensor / between + policy.layers * device.gather(
        run.short * policy.parameters / policy.layers, shards
    )
    sampling, training = sum(generate.values()) + sum(score.values()), sum(train.values())
    seconds = (max(sampling, training) if behind else sampling + training) + sync
    step = total(generate, score, train, {"network": sync}, weights=[rollout / gpus, rollout / gpus, trainers / gpus, 1.0])
    step["waiting"] = seconds - sum(step.values())
    chunks = math.ceil(math.ceil(math.ceil(run.answers / run.minibatches) / trainers) / forward_rows)
    steps = run.epochs * run.minibatches
    sent = steps * chunks * (2 * run.short + FULL) * policy.trunk * (shards - 1) / shards
    copies = trainers // shards
    sent += steps * 2 * FULL * policy.parameters / shards * (copies - 1) / copies
    sent = sent * trainers / gpus + run.short * policy.parameters / tensor * rollout / gpus
    memory = max(
        total(state, needed),
        {"rollout weights": inference, "keys and values": sampling_memory(policy, run, at_once, tensor)},
        key=lambda parts: sum(parts.values()),
    )
    return Plan(
        name,
        gpus,
        generate=generate,
        score=score,
        train=train,
        sync=sync,
        step=step,
        seconds=seconds,
        sent=sent,
        memory=memory,
        at_once=at_once,
        forward_rows=forward_rows,
        checkpointing=checkpointing,
        rollout=rollout,
        tensor=tensor,
    )


def _training_seconds(device: Device, policy: Transformer, run: Run, gpus: int, shards: int) -> float:
    if gpus % shards:
        return math.inf
    chosen = best_update(device, policy, run, gpus, sum(training_state(policy, shards).values()), shards=shards)
    return math.inf if isinstance(chosen, float) else sum(chosen[0].values())


# --- supervised fine-tuning and reward models ----------------------------------------------------------------------------------------


def training_step(device: Device, model: Transformer, run: Run, gpus: int, *, sharded: bool, outputs: float) -> Plan:
    """One optimizer step over `run.answers` texts (1 epoch of 1 minibatch) with Lightning's ddp or fsdp; `outputs`: logits per text."""
    shards = gpus if sharded else 1
    state = training_state(model, shards)
    name = "fsdp" if sharded else "ddp"
    chosen = best_update(device, model, run, gpus, sum(state.values()), shards=shards, overlapped=True, outputs=outputs)
    if isinstance(chosen, float):
        return Plan(name, gpus, missing=chosen)
    train, needed, rows, checkpointing = chosen
    seconds = sum(train.values())
    return Plan(
        name, gpus, train=train, step=train, seconds=seconds, memory=total(state, needed), forward_rows=rows, checkpointing=checkpointing
    )
