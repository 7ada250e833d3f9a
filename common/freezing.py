"""Which parameters train: by what a module is and where it stands, not by one architecture's parameter names.

Groups: `emb` embeddings (a tied output layer is the same tensor), `ln` norms, `attn` everything else inside an attention module,
`ff` everything else inside a transformer block, `other` the rest. Works for any model whose blocks stand in a `ModuleList` and whose
attention classes are called so: GPT-Neo, GPT-2, Llama, Qwen, OPT, BERT, T5 and their kin.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from common.errors import UserError
from common.model_source import check_layer_indices
from common.schema import FreezeSettings

Group = Literal["emb", "ln", "attn", "ff", "other"]
GROUPS: tuple[Group, ...] = ("emb", "ln", "attn", "ff", "other")
HEAD = "head"


@dataclass(frozen=True)
class Block:
    """One transformer block: the name prefix of its parameters, its index, and how many blocks its stack has."""

    prefix: str
    index: int
    count: int


@dataclass(frozen=True)
class FreezingRow:
    """Parameters (numbers, not tensors) of one group."""

    group: str
    trained: int
    frozen: int

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen

    @property
    def state(self) -> str:
        if not self.frozen:
            return "trained"
        return "partly trained" if self.trained else "frozen"


@dataclass(frozen=True)
class FreezingTable:
    """What `apply_freezing` did, for the log and the summary."""

    rows: tuple[FreezingRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> int:
        return sum(row.trained for row in self.rows)

    @property
    def frozen(self) -> int:
        return sum(row.frozen for row in self.rows)

    def __str__(self) -> str:
        rows = [*self.rows, FreezingRow("total", self.trained, self.frozen)]
        lines = [f"{'group':<6} {'parameters':>14} {'trained':>14} {'frozen':>14}"]
        lines += [f"{row.group:<6} {row.parameters:>14,} {row.trained:>14,} {row.frozen:>14,}  {row.state}" for row in rows]
        return "\n".join([*lines, *self.notes])


def find_blocks(model: nn.Module) -> list[Block]:
    """The transformer blocks: members of the outermost `ModuleList`s in which every member holds attention."""
    blocks: list[Block] = []
    stacks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack + ".") for stack in stacks)
        if inside or not isinstance(module, nn.ModuleList) or len(module) == 0 or is_attention(name, module):
            continue
        if all(any(is_attention(inner, part) for inner, part in member.named_modules()) for member in module):
            stacks.append(name)
            blocks += [Block(f"{name}.{index}.", index, len(module)) for index in range(len(module))]
    return blocks


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module, by its class or the last part of its name, is attention."""
    attribute = name.rpartition(".")[2].lower()
    return "attention" in type(module).__name__.lower() or attribute in {"attn", "attention", "self_attn", "cross_attn", "crossattention"}


def parameter_groups(model: nn.Module) -> dict[str, Group]:
    """Group of every parameter of a model."""
    modules = dict(model.named_modules())
    blocks = find_blocks(model)
    groups: dict[str, Group] = {}
    for name, _ in model.named_parameters():
        path = name.split(".")[:-1]
        ancestors = [".".join(path[: depth + 1]) for depth in range(len(path))]
        owner = modules[".".join(path)]
        block = next((block for block in blocks if name.startswith(block.prefix)), None)
        # Attention counts inside blocks only: a whole model may have the word in its class name.
        in_attention = block is not None and any(
            is_attention(ancestor, modules[ancestor]) for ancestor in ancestors if len(ancestor) >= len(block.prefix)
        )
        if "norm" in type(owner).__name__.lower():
            groups[name] = "ln"
        elif in_attention:
            groups[name] = "attn"
        elif isinstance(owner, nn.Embedding):
            groups[name] = "emb"
        else:
            groups[name] = "ff" if block is not None else "other"
    return groups


def layer_indices(requested: Sequence[int], count: int) -> set[int]:
    """Indices from 0 that `requested` (negative: from the end) picks among `count` layers, those out of range left out."""
    return {index % count for index in requested if -count <= index < count}


def apply_freezing(
    model: nn.Module, settings: FreezeSettings, *, always_train: Sequence[str] = (), unread: Collection[str] = ()
) -> FreezingTable:
    """Set `requires_grad` of every parameter, and say what was done.

    `settings.layers_not_to_freeze` wins over the flags; an index means that block of each stack (T5: of the encoder and of the
    decoder). `always_train`: prefixes of fresh heads, which train whatever the flags say. `unread`: parameters that nothing is
    computed with, which stay as they are. Raises UserError where an index is out of range or nothing is left to train.
    """
    blocks = find_blocks(model)
    frozen_groups: set[Group] = set()
    kept: list[str] = []
    check_layer_indices(settings.layers_not_to_freeze, max((block.count for block in blocks), default=0), "layers_not_to_freeze")
    if settings.active:
        frozen_groups = {group for group in GROUPS if getattr(settings, f"freeze_{group}")}
        kept = [block.prefix for block in blocks if block.index in layer_indices(settings.layers_not_to_freeze, block.count)]
    groups = parameter_groups(model)
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        is_head = any(name == prefix or name.startswith(prefix + ".") for prefix in always_train)
        label = HEAD if is_head else groups[name]
        trains = is_head or (name not in unread and (groups[name] not in frozen_groups or name.startswith(tuple(kept))))
        parameter.requires_grad_(trains)
        counts = trained if trains else frozen
        counts[label] = counts.get(label, 0) + parameter.numel()
    if not trained:
        raise UserError("freeze_*: nothing is left to train; let a group train or name a layer in layers_not_to_freeze")
    present = [label for label in (*GROUPS, HEAD) if label in trained or label in frozen]
    rows = tuple(FreezingRow(label, trained.get(label, 0), frozen.get(label, 0)) for label in present)
    notes = _notes(settings, frozen_groups, blocks, HEAD in trained)
    if unread:
        notes += (f"{len(unread)} tensors stay as they are: no score is read out of them",)
    return FreezingTable(rows, notes)


def _notes(settings: FreezeSettings, frozen_groups: set[Group], blocks: Sequence[Block], has_head: bool) -> tuple[str, ...]:
    if not frozen_groups:
        idle = ["do_freeze"] * bool(settings.do_freeze) + ["layers_not_to_freeze"] * bool(settings.layers_not_to_freeze)
        return (f"{' and '.join(idle)} without effect, since no freeze_* is in force",) if idle else ()
    notes = []
    if settings.layers_not_to_freeze:
        count = max(block.count for block in blocks)
        layers = ", ".join(map(str, sorted(layer_indices(settings.layers_not_to_freeze, count))))
        notes.append(f"layers {layers} of {count} train whatever the flags say")
    if has_head:
        notes.append("the fresh head trains, whatever is frozen")
    return tuple(notes)


def freeze_eval(model: nn.Module) -> None:
    """Put every submodule whose parameters are all frozen into eval mode: call it after each `model.train()`.

    Dropout in a frozen block would only add noise to what cannot adapt to it.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if module.training and parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
