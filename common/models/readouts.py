"""Readouts: hidden states in, one score per row out. The objective (pairs or scores) does not matter here, nor does the transformer.

A pooled readout takes one vector of the tokens of each layer, one vector of those of all layers, and a score of that:

    readout                     tokens of a layer     layers
    mean_pool                   mean                  the last alone
    weighted_layers             one token             learnt weights
    layerwise_attention         gated attention       learnt weights
    full_attention_pooling      attention             attention
    attention_pooled_encoder    one token             attention
    attention_pooled_decoder    one token             attention
    decoder_output              one token             the last alone

Which token is one and which part of the transformer is read is in `common.readout_settings`. States of lower layers may be a thousand
times larger than those behind a final norm (T5's are), so every vector is normalised before it is weighed, mixed or scored.

Several readouts of the same states make an ensemble, whose score is their mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.backbone import States
from common.readout_settings import Needs, ReadoutName, ReadoutSettings


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever type its input and its weights are of (float64 where the weights are)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float, generator: torch.Generator | None = None) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=torch.float32)
        with torch.no_grad():
            self.weight.normal_(std=std, generator=generator)
            if bias:
                self.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) of any type -> (..., outputs)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class ScoreHead(Float32Linear):
    """One output without bias, as transformers' sequence classifiers have it; weights normal with std 1 / sqrt(D + 1).

    It stays in float32 whatever the backbone's type: the difference of two scores is what matters, and bfloat16 has 8 bits of it.
    """

    def __init__(self, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__(hidden_size, 1, bias=False, std=1.0 / math.sqrt(hidden_size + 1), generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) of any type -> (B,) float32, whatever type the weights are of (float64 where they are float64)."""
        return super().forward(features).squeeze(-1)


class Readout(nn.Module):
    """Base of all readouts. `forward` maps states to scores (B,) in float32."""

    def forward(self, states: States) -> Tensor:
        raise NotImplementedError

    def member_scores(self, states: States) -> Tensor:
        """Scores of the M members of an ensemble, (B, M); any other readout is its own only member."""
        scores: Tensor = self(states)
        return scores[:, None]

    def linear_weight(self) -> Tensor | None:
        """The weight (1, D) that scores the final state of one token; None where more than that makes a score."""
        return None


class LastToken(Readout):
    """The final state of one token, the last (encoders: the first, where they gather the sentence), through a linear head."""

    def __init__(self, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.score = ScoreHead(hidden_size, generator)

    def forward(self, states: States) -> Tensor:
        scores: Tensor = self.score(states.values[:, -1])
        return scores

    def linear_weight(self) -> Tensor:
        return self.score.weight


class Pooled(Readout):
    """Tokens of each layer -> a vector of each layer -> one vector -> hidden layers, if any -> a score."""

    def __init__(self, settings: ReadoutSettings, hidden_size: int, layers: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        count = layers if settings.name in _GATED or settings.name in _ATTENTIVE else 0
        gate = settings.attention_size if settings.name in _GATED else None
        self.tokens = nn.ModuleList(Attention(hidden_size, gate, generator) for _ in range(count))  # none: a mean
        # Over a single layer there is nothing to choose, and nothing that could be learnt.
        self.layers: nn.Module | None = None
        if layers > 1:
            self.layers = LayerWeights(layers) if settings.name in _WEIGHTED else Attention(hidden_size, None, generator)
        widths = [hidden_size, *settings.hidden_sizes]
        self.hidden = nn.ModuleList(
            # He et al. 2015: behind a ReLU the mean square of the features stays 1
            Float32Linear(inputs, outputs, bias=True, std=math.sqrt(2 / inputs), generator=generator)
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.score = ScoreHead(widths[-1], generator)

    def forward(self, states: States) -> Tensor:
        with torch.autocast(states.values.device.type, enabled=False):
            vectors = self._vectors(states._replace(values=states.values.to(torch.promote_types(self.score.weight.dtype, torch.float32))))
            pooled = vectors[:, 0] if self.layers is None else self.layers(normalised(vectors))
            features = normalised(pooled)  # (B, D)
            for layer in self.hidden:
                features = F.relu(layer(self.dropout(features)))
            scores: Tensor = self.score(self.dropout(features))
        return scores

    def _vectors(self, states: States) -> Tensor:
        """The tokens of each layer as one vector: (B, L, D)."""
        if len(self.tokens):
            states = states._replace(values=normalised(states.values))
            attentions = (attention for attention in self.tokens if isinstance(attention, Attention))
            seen = zip(attentions, states.values.unbind(1), strict=True)
            logits = torch.stack([attention.logits(layer) for attention, layer in seen], 1)  # (N, L)
            return torch.stack([weighted_mean(*row) for row in zip(logits.split(states.lengths), states.rows(), strict=True)])
        if len(states.values) == len(states.lengths):  # a token each
            return states.values
        return torch.stack([row.mean(0) for row in states.rows()])


class Ensemble(Readout):
    """M readouts of the same states, alike but for the weights they started from. The score is the mean of theirs."""

    def __init__(self, members: Sequence[Readout]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, states: States) -> Tensor:
        return self.member_scores(states).mean(1)

    def member_scores(self, states: States) -> Tensor:
        return torch.stack([member(states) for member in self.members], 1)

    def linear_weight(self) -> Tensor | None:
        members = (member for member in self.members if isinstance(member, Readout))
        weights = [weight for member in members if (weight := member.linear_weight()) is not None]
        return torch.stack(weights).mean(0) if weights else None


class Attention(nn.Module):
    """A mean of N vectors, weighed by a softmax of what a learnt query sees in each: in the vector or, `gate` wide, in a GEGLU of it."""

    def __init__(self, size: int, gate: int | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.projection = None
        if gate is not None:
            self.projection = Float32Linear(size, 2 * gate, bias=False, std=1 / math.sqrt(size), generator=generator)
        width = gate or size
        self.query = nn.Parameter(torch.randn(width, generator=generator) / math.sqrt(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, N, D), normalised -> (B, D)."""
        return torch.einsum("bn,bnd->bd", self.logits(vectors).softmax(-1), vectors)

    def logits(self, vectors: Tensor) -> Tensor:
        """(..., D), normalised -> (...): how much each counts, in nats."""
        seen = vectors
        if self.projection is not None:  # Shazeer 2020: gelu(x W) * (x V)
            gate, value = self.projection(vectors).chunk(2, dim=-1)
            seen = F.gelu(gate) * value
        return seen @ self.query.to(seen.dtype)


class LayerWeights(nn.Module):
    """A mix of layers with learnt weights, the same for every row; all alike in the beginning."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers))

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, L, D) -> (B, D)."""
        return torch.einsum("l,bld->bd", self.logits.to(vectors.dtype).softmax(0), vectors)


_GATED: Sequence[ReadoutName] = ("layerwise_attention",)
_ATTENTIVE: Sequence[ReadoutName] = ("full_attention_pooling",)
_WEIGHTED: Sequence[ReadoutName] = ("layerwise_attention", "weighted_layers")


def normalised(vectors: Tensor) -> Tensor:
    """(..., D) with mean 0 and mean square 1."""
    return F.layer_norm(vectors, vectors.shape[-1:], eps=1e-12)


def weighted_mean(logits: Tensor, vectors: Tensor) -> Tensor:
    """Of T tokens in each of L layers, weighed by a softmax over tokens: (T, L) and (T, L, D) -> (L, D)."""
    return (logits.softmax(0).T[:, None] @ vectors.transpose(0, 1))[:, 0]


def build_readout(settings: ReadoutSettings, needs: Needs, hidden_size: int, seed: int) -> Readout:
    """The readout that the settings ask for, with fresh weights that depend on `seed` alone.

    The first member of an ensemble starts as the readout alone would.
    """
    generator = torch.Generator().manual_seed(seed)

    def build() -> Readout:
        if settings.name == "last_token":
            return LastToken(hidden_size, generator)
        return Pooled(settings, hidden_size, needs.layers, generator)

    return build() if settings.ensemble == 1 else Ensemble([build() for _ in range(settings.ensemble)])
