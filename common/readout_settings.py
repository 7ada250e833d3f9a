"""Which states of which transformer every readout reads, and its settings; torch-free, so that a config can be checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.model_source import BackboneKind
from common.schema import KeyedProblems, PositiveInt, Section

ReadoutName = Literal[
    "last_token",
    "layerwise_attention",
    "full_attention_pooling",
    "decoder_output",
    "attention_pooled_encoder",
    "attention_pooled_decoder",
    "mean_pool",
    "weighted_layers",
]
Part = Literal["whole", "encoder", "decoder"]
Token = Literal["all", "first", "last"]


class Place(NamedTuple):
    """`part` of the transformer that is read (`whole`: it has but one), and its real tokens that are."""

    part: Part
    token: Token


class Needs(NamedTuple):
    """The hidden states that a readout reads, and no others: `layers` upper layers, the last of them after the final norm."""

    part: Part
    token: Token
    layers: int = 1

    @property
    def splits_text(self) -> bool:
        """Whether the prompt enters the encoder and the answer the decoder; else both enter together, and a decoder sees its start."""
        return self.part == "decoder" and self.token == "last"


Places = Mapping[BackboneKind, Place]
_ENCODED: Places = {"encoder": Place("whole", "first"), "encoder_decoder": Place("encoder", "first")}
_EVERYWHERE: Places = {"causal": Place("whole", "all"), "encoder": Place("whole", "all"), "encoder_decoder": Place("encoder", "all")}
_GATHERED: Places = {"causal": Place("whole", "last"), "encoder": Place("whole", "first")}
_START = Place("decoder", "first")

READS: dict[ReadoutName, Places] = {
    "last_token": {**_GATHERED, "encoder_decoder": Place("decoder", "last")},
    "mean_pool": _EVERYWHERE,
    "layerwise_attention": _EVERYWHERE,
    "full_attention_pooling": _EVERYWHERE,
    "weighted_layers": {**_GATHERED, "encoder_decoder": _START},
    "attention_pooled_encoder": _ENCODED,
    "attention_pooled_decoder": {"encoder_decoder": _START},
    "decoder_output": {"encoder_decoder": _START},
}
"""What each readout reads of each kind of transformer; where a kind is missing, the combination makes no sense."""

KIND_WORDS: dict[BackboneKind, str] = {"causal": "a causal model", "encoder": "an encoder", "encoder_decoder": "an encoder-decoder"}
PARTS: dict[BackboneKind, tuple[Part, ...]] = {"causal": ("whole",), "encoder": ("whole",), "encoder_decoder": ("encoder", "decoder")}

_HEAD = ("hidden_sizes", "dropout")
SETTINGS: dict[ReadoutName, tuple[str, ...]] = {
    "last_token": (),
    "mean_pool": _HEAD,
    "layerwise_attention": ("n_layers", "attention_size", *_HEAD),
    "full_attention_pooling": ("n_layers", *_HEAD),
    "weighted_layers": ("n_layers", *_HEAD),
    "attention_pooled_encoder": ("n_layers", *_HEAD),
    "attention_pooled_decoder": ("n_layers", *_HEAD),
    "decoder_output": _HEAD,
}
"""The settings that each readout has."""
_OF_ENSEMBLES = ("ensemble", "bootstrap")
_NOT_SAVED = {"dropout", "bootstrap"}  # training alone depends on them


class ReadoutSettings(Section):
    """How a score is read out of the transformer."""

    name: ReadoutName = Field("last_token", description="What is read of the transformer; see the table of readouts.")
    n_layers: PositiveInt | None = Field(None, description="Upper layers that are read; null: all of them.")
    attention_size: PositiveInt = Field(64, description="Width of the gated projection in `layerwise_attention`.")
    hidden_sizes: list[PositiveInt] = Field(default_factory=list, description="Widths of hidden layers in the head; none: it is linear.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before each layer of the head.")
    ensemble: PositiveInt = Field(
        1, description="Readouts that are trained side by side over one backbone, from different beginnings; the score is their mean."
    )
    bootstrap: bool = Field(
        False, description="Each readout of an ensemble learns from a resample of the rows: one counts 0, 1, 2 … times, by Poisson(1)."
    )

    @model_validator(mode="after")
    def _every_setting_is_read(self) -> Self:
        reads = SETTINGS[self.name]
        read = ("name", *_OF_ENSEMBLES, *reads)
        idle = [name for name in self.model_fields_set if name not in read and getattr(self, name) != DEFAULTS[name]]
        if idle:
            has = f"{self.name} has {', '.join(reads) or 'no settings'}"
            raise KeyedProblems({(name,): f"got {getattr(self, name)}, expected nothing here: {has}" for name in sorted(idle)})
        if self.bootstrap and self.ensemble == 1:
            raise KeyedProblems({("bootstrap",): "got true, which needs an ensemble of 2 or more"})
        return self

    @model_serializer(mode="wrap")
    def _own_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = ("name", *SETTINGS[self.name], *(_OF_ENSEMBLES if self.ensemble > 1 else ()))
        return {name: value for name, value in handler(self).items() if name in own}

    @property
    def reads_layers(self) -> bool:
        """Whether layers below the last are read, too."""
        return "n_layers" in SETTINGS[self.name]

    @property
    def shape(self) -> dict[str, Any]:
        """What saved weights depend on."""
        return self.model_dump(exclude=_NOT_SAVED)


DEFAULTS: dict[str, Any] = {
    name: field.get_default(call_default_factory=True, validated_data={}) for name, field in ReadoutSettings.model_fields.items()
}


def readout_problems(settings: ReadoutSettings, kind: BackboneKind, layers: Mapping[Part, int] | None = None) -> dict[str, str]:
    """What is wrong with a readout over a transformer of this kind, by setting; `layers`: of its parts, where they are known."""
    place = READS[settings.name].get(kind)
    if place is None:
        fitting = ", ".join(name for name in get_args(ReadoutName) if kind in READS[name])
        return {"name": f"got {settings.name}, which makes no sense over {KIND_WORDS[kind]}, expected one of: {fitting}"}
    has = (layers or {}).get(place.part)
    if settings.n_layers is not None and has is not None and settings.n_layers > has:
        return {"n_layers": f"got {settings.n_layers}, expected at most the model's {has} layers"}
    return {}
