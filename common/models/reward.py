"""Reward models: backbone + readout -> one score per answer, and the scorer that turns texts into scores."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from common.checkpoint import Manifest, read_manifest
from common.errors import UserError
from common.model_source import check_model_source
from common.models.answers import Answer, collate_answers
from common.models.backbone import (
    Entry,
    RewardBatch,
    RewardInput,
    States,
    as_reward_input,
    backbone_states,
    hidden_size,
    line_states,
    readout_needs,
    rows_of_like_length,
)
from common.models.kinds import backbone_kind, positions_of
from common.models.last_layer import LastFeedForward
from common.models.load import Dtype, check_vocabulary, load_backbone, load_sequence_classifier, load_tokenizer, load_weights
from common.models.lower_layers import LowerLayers
from common.models.modes import evaluating
from common.models.packed import can_pack
from common.models.parts import without_adapters
from common.models.prepacked import prepacked
from common.models.readouts import LastToken, build_readout
from common.readout_settings import ReadoutSettings
from common.records import Prompt
from common.score_transform import LEAST_SCALE, ScoreTransform
from common.tokenization import Encoded, Encoder

READOUT_FILE = "readout.safetensors"
_UNKNOWN_LENGTH = 512  # tokens that are read where neither a manifest nor the positions limit them


class RewardModel(nn.Module):
    """Backbone + readout. `forward` gives raw scores (B,) in float32, before any score transform is undone."""

    HEAD_PREFIXES = ("readout",)
    """Parameters that always train, whatever the freezing flags say."""

    def __init__(self, backbone: PreTrainedModel, readout_settings: ReadoutSettings, seed: int) -> None:
        """Raises UserError where the readout makes no sense over this backbone."""
        super().__init__()
        self.backbone = backbone
        self.readout_settings = readout_settings
        self.needs = readout_needs(readout_settings, backbone.config)
        self.readout = build_readout(readout_settings, self.needs, hidden_size(backbone.config), seed)
        self._padding_free = self._packs = False
        self._last: LastFeedForward | None = None
        self._lower: LowerLayers | None = None

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str,
        readout_settings: ReadoutSettings | None = None,
        *,
        seed: int = 0,
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
    ) -> Self:
        """A reward model with a fresh head over a transformer, or over the one in a directory of any kind."""
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(backbone, readout_settings or ReadoutSettings(), seed)

    @classmethod
    def start(
        cls,
        name: str,
        readout_settings: ReadoutSettings | None = None,
        *,
        seed: int = 0,
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
    ) -> Self:
        """What training starts from: a reward model with the head it has, any other model as a backbone with a fresh one."""
        source = check_model_source(name, role="backbone", trust_remote_code=trust_remote_code)
        if source.is_reward_model:
            return cls.load(name, dtype=dtype, trust_remote_code=trust_remote_code, readout_settings=readout_settings)
        return cls.from_backbone(name, readout_settings, seed=seed, dtype=dtype, trust_remote_code=trust_remote_code)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
        readout_settings: ReadoutSettings | None = None,
        weights: Sequence[Path] = (),
    ) -> Self:
        """Load a reward model with its head: a directory of `save_pretrained`, or a causal sequence classifier with one output.

        `readout_settings`: what the caller expects, dropout excepted; another readout in the directory is a UserError. `weights`: files
        with all weights of such a classifier, over the transformer that the directory describes.
        """
        name = str(directory)
        if weights:
            backbone, head = load_sequence_classifier(name, dtype=dtype, trust_remote_code=trust_remote_code, weights=weights)
            return cls._last_token_over(backbone, head, ReadoutSettings()).eval()
        source = check_model_source(name, setting="reward model", role="reward", trust_remote_code=trust_remote_code)
        saved = _saved_settings(name, source.manifest)
        settings = readout_settings or saved
        if settings.shape != saved.shape:
            raise UserError(f"{name} has the readout {saved.shape}, but the config asks for {settings.shape}")
        if source.directory is not None and (source.directory / READOUT_FILE).is_file():
            model = cls(load_backbone(name, dtype=dtype, trust_remote_code=trust_remote_code), settings, seed=0)
            load_weights(model.readout, source.directory / READOUT_FILE)
        else:
            backbone, head = load_sequence_classifier(name, dtype=dtype, trust_remote_code=trust_remote_code)
            model = cls._last_token_over(backbone, head, settings)
        return model.eval()

    @classmethod
    def _last_token_over(cls, backbone: PreTrainedModel, head: Tensor, settings: ReadoutSettings) -> Self:
        """A reward model with a linear head (1, D) that is known."""
        model = cls(backbone, settings, seed=0)
        assert isinstance(model.readout, LastToken)
        model.readout.score.load_state_dict({"weight": head.float()})
        return model

    @property
    def unread_parameters(self) -> frozenset[str]:
        """Names of the parameters that no score depends on: a decoder's where the encoder alone is read."""
        if self.needs.part != "encoder":
            return frozenset()
        read = {id(parameter) for parameter in (*without_adapters(self.backbone).get_encoder().parameters(), *self.readout.parameters())}
        return frozenset(name for name, parameter in self.named_parameters() if id(parameter) not in read)

    @property
    def entry(self) -> Entry:
        """Which text enters which part of the backbone."""
        return Entry.of(self.config, self.needs)

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        config = self.backbone.config
        assert isinstance(config, PreTrainedConfig)
        return config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        entering: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, S) and masks (B, S), True on real tokens -> raw scores (B,). The arguments are those of a `RewardBatch`."""
        return self.scores(RewardBatch(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, entering))

    def scores(self, inputs: RewardBatch | States) -> Tensor:
        """Raw scores (B,) of a batch, or of states that were computed before: the mean over the members of an ensemble."""
        return self.member_scores(inputs).mean(1)

    def member_scores(self, inputs: RewardBatch | States) -> Tensor:
        """As `scores`, of each of the M members of an ensemble: (B, M). Any other readout is its own only member."""
        if isinstance(inputs, States):
            return self.readout.member_scores(inputs)
        parts = [(rows, self.readout.member_scores(states)) for rows, states in self._states(inputs)]
        return torch.cat([scores for _, scores in parts])[torch.cat([rows for rows, _ in parts]).argsort()]

    @property
    def members(self) -> int:
        """Readouts of the ensemble; 1 where there is none."""
        return self.readout_settings.ensemble

    def state_rows(self, batch: RewardBatch) -> list[Tensor]:
        """The states that the readout reads, (T, L, D) of each row without padding: `readout(collate_states(rows))` are the scores."""
        parts = [(rows, states.rows()) for rows, states in self._states(batch)]
        by_row = {int(row): own for rows, owns in parts for row, own in zip(rows, owns, strict=True)}
        return [by_row[row] for row in range(len(by_row))]

    def _states(self, batch: RewardBatch) -> Iterator[tuple[Tensor, States]]:
        """The states of the batch in parts, with the rows that each part has."""
        everything = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
        if self._packs:
            yield everything, line_states(self.backbone, batch, self.needs, self._last, self._lower)
        elif not self._padding_free or not bool(batch.attention_mask[:, 0].all()):  # padded on the left
            yield everything, backbone_states(self.backbone, batch, self.needs, self._lower)
        else:
            for rows, part in rows_of_like_length(batch):
                yield rows, backbone_states(self.backbone, part, self.needs, self._lower)

    @property
    def padding_free(self) -> bool:
        """Whether batches are read without padding."""
        return self._padding_free

    @property
    def packs(self) -> bool:
        """Whether batches are read in a line."""
        return self._packs

    def set_padding_free(self, on: bool = True) -> None:
        """Whether batches are read without padding from now on: in a line where the backbone can, else rows of like length together.

        Scores and gradients stay the same to rounding. It pays on a CPU; a GPU would start kernels for each row.
        """
        self._padding_free = on
        plain = without_adapters(self.backbone)
        self._packs = on and backbone_kind(self.config) == "causal" and can_pack(plain)
        self._last = LastFeedForward.find(plain) if self._packs and self.needs.token != "all" else None

    def start_above(self, lower: LowerLayers) -> None:
        """From now on batches that have the states entering above `lower` start there. Raises UserError if the readout reads below."""
        most = len(lower.above) + 1
        if self.needs.layers > most:
            raise UserError(
                f"model_params.readout.n_layers: {self.readout_settings.name} reads {self.needs.layers} layers, of which "
                f"{self.needs.layers - most} lie below those that cache_states keeps; set it to {most} at most, or leave out cache_states"
            )
        self._lower = lower

    def save_pretrained(self, folder: Path | str) -> None:
        """Write weights and configuration into an existing folder.

        A last-token model of a causal backbone becomes what `AutoModelForSequenceClassification` loads to the same scores; any
        other one the backbone's own directory with the readout's weights beside it.
        """
        folder = Path(folder)
        shell = self._as_sequence_classifier()
        if shell is not None:
            shell.save_pretrained(folder)
            return
        self.backbone.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.readout.state_dict().items()}, folder / READOUT_FILE)

    def _as_sequence_classifier(self) -> PreTrainedModel | None:
        """transformers' sequence classifier around the same weights; None where it would compute something else."""
        classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(self.config), None)
        if not isinstance(self.readout, LastToken) or backbone_kind(self.config) != "causal" or not isinstance(classifier, type):
            return None
        config = copy.deepcopy(self.config)
        config.num_labels = 1
        with torch.device("meta"):
            shell: PreTrainedModel = classifier(config)
        head = getattr(shell, "score", None)
        same_trunk = type(getattr(shell, shell.base_model_prefix, None)) is type(self.backbone)
        if not isinstance(head, nn.Linear) or head.bias is not None or head.in_features != self.readout.score.in_features or not same_trunk:
            return None
        setattr(shell, shell.base_model_prefix, self.backbone)
        shell.score = self.readout.score
        return shell


def _saved_settings(name: str, manifest: Manifest | None) -> ReadoutSettings:
    """The readout of a directory; those that name none, such as sequence classifiers from elsewhere, read the last token."""
    saved = (manifest.readout if manifest else None) or {}
    try:
        return ReadoutSettings.model_validate(saved)
    except ValidationError:
        raise UserError(f"{name} has the readout {saved}, which is none of this version") from None


class Judgement(NamedTuple):
    """What a reward model makes of one answer."""

    score: float
    """Its final score."""
    members: list[float]
    """The final scores of the members of an ensemble (any other readout: the score). Each is shifted by how far its mean on the training
    set lies from the model's, as far as a manifest tells: pairs leave the zero of every member free, and only what they say of this answer
    alone is their disagreement."""

    @property
    def spread(self) -> float:
        """Standard deviation of the members."""
        return statistics.pstdev(self.members)


class RewardScorer:
    """Scores texts with a trained reward model and its own tokenizer, whatever model wrote them.

    A row's score depends neither on its batch nor on padding (to 1e-6 in float32). Scores are final: on the scale of the training
    data, with the score transform undone.
    """

    def __init__(
        self,
        model: RewardModel | Path | str,
        *,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        manifest: Manifest | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        truncate_prompt: bool = True,
        weights: Sequence[Path] = (),
        offload: bool = False,
    ) -> None:
        """`model`: a directory, or a model in memory with its `tokenizer` and `manifest`.

        `max_length`, `max_prompt_length`: tokens; default: the manifest's. `weights`: as of `RewardModel.load`. `offload`: the model lies
        in the CPU's memory, and on `device` only while it scores.
        """
        if isinstance(model, RewardModel):
            assert tokenizer is not None and manifest is not None, "a model in memory comes with its tokenizer and manifest"
            self.model = model
        else:
            self.model = RewardModel.load(model, dtype=dtype, trust_remote_code=trust_remote_code, weights=weights)
            tokenizer = tokenizer or load_tokenizer(str(model), trust_remote_code=trust_remote_code)
            manifest = manifest or (None if weights else read_manifest(model))
            check_vocabulary(tokenizer, self.model.backbone, str(model))
        self.manifest = manifest
        self.device = torch.device(device)
        self.offload = offload
        self.model.to("cpu" if offload else self.device)
        self.model.set_padding_free(self.device.type == "cpu")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.transform = (self.manifest.score_transform if self.manifest else None) or ScoreTransform()
        self.encoder = Encoder(
            tokenizer,
            prompt_format=self.manifest.prompt_format if self.manifest else "qa",
            max_length=max_length
            or (self.manifest.max_length if self.manifest else None)
            or positions_of(self.model.config)
            or _UNKNOWN_LENGTH,
            max_prompt_length=max_prompt_length or (self.manifest.max_prompt_length if self.manifest else None),
            truncate_prompt=truncate_prompt,
            is_encoder_decoder=self.model.entry.splits,
        )

    @property
    def knows_its_scale(self) -> bool:
        """Whether a manifest tells mean and scale of the scores: not so for other people's models and runs that were stopped."""
        return self.manifest is not None and self.manifest.score_mean is not None and self.manifest.score_scale is not None

    @property
    def score_mean(self) -> float:
        """Mean of output scores on the training set; 0 where no manifest tells."""
        return (self.manifest.score_mean if self.manifest else None) or 0.0

    @property
    def score_scale(self) -> float:
        """Standard deviation of output scores on the training set; 1 where no manifest tells, or where all scores are about the same."""
        scale = self.manifest.score_scale if self.manifest else None
        return scale if scale is not None and scale > LEAST_SCALE else 1.0

    def score(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]:
        """Final scores of prompts (a string is a question without context) and answers, in their order.

        `ended`: False for an answer cut off while being written, so that no EOS follows it; default: all ended.
        """
        return self.transform.invert(self.raw_scores(prompts, responses, ended))

    def raw_scores(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]:
        """As `score`, with the score transform left on: what `AutoModelForSequenceClassification` gives."""
        return self.score_inputs(self._inputs(prompts, responses, ended))

    def judge(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[Judgement]:
        """As `score`, with what each member of an ensemble says."""
        raw = self.score_members(self._inputs(prompts, responses, ended))
        scores = self.transform.invert(raw.mean(1).tolist())
        members = [self.transform.invert(column) for column in raw.T.tolist()]
        shifts = self._member_shifts
        return [
            Judgement(score, [value - shift for value, shift in zip(values, shifts, strict=True)])
            for score, values in zip(scores, zip(*members, strict=True), strict=True)
        ]

    @property
    def _member_shifts(self) -> list[float]:
        """By how much each member's mean on the training set lies above the model's; 0 where no manifest tells."""
        means = self.manifest.member_means if self.manifest else None
        return [0.0] * self.model.members if means is None else [mean - self.score_mean for mean in means]

    def _inputs(self, prompts: Sequence[Prompt | str], responses: Sequence[str], ended: Sequence[bool] | None) -> list[RewardInput]:
        if len(prompts) != len(responses) or (ended is not None and len(ended) != len(responses)):
            raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses" + (f", {len(ended)} ended" if ended is not None else ""))
        flags = [True] * len(responses) if ended is None else list(ended)
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        encoded = self.encoder.pairs(asked, responses, unusable_rows="drop")
        del self.encoder.counts["rows dropped"]  # they are judged all the same
        entry = self.model.entry
        return [
            as_reward_input(row or self._empty_answer(prompt), entry, ended=flag)
            for row, prompt, flag in zip(encoded, asked, flags, strict=True)
        ]

    def _empty_answer(self, prompt: Prompt) -> Encoded:
        """An answer without any token ends at once; it is judged, not refused."""
        return Encoded(self.encoder.prompt(prompt)[: self.encoder.max_length - 1], [self.encoder.tokenizer.eos_token_id])

    def score_inputs(self, rows: Sequence[Answer]) -> list[float]:
        """Raw scores of rows of tokens or states, in their order; rows of like length are scored together."""
        scores: list[float] = self.score_members(rows).mean(1).tolist()
        return scores

    def score_members(self, rows: Sequence[Answer]) -> Tensor:
        """As `score_inputs`, of each of the M members of an ensemble: (N, M) float64 on the CPU."""
        order = sorted(range(len(rows)), key=lambda index: rows[index].length)
        scores = torch.zeros(len(rows), self.model.members, dtype=torch.float64)
        with self._on_its_device(), evaluating(self.model), torch.inference_mode(), prepacked(self.model):
            for start in range(0, len(order), self.batch_size):
                chunk = order[start : start + self.batch_size]
                batch = collate_answers([rows[index] for index in chunk], self.tokenizer.pad_token_id).to(self.device)
                scores[chunk] = self.model.member_scores(batch).to(scores)
        return scores

    @contextlib.contextmanager
    def _on_its_device(self) -> Iterator[None]:
        if not self.offload:
            yield
            return
        self.model.to(self.device)
        try:
            yield
        finally:
            self.model.to("cpu")
