"""Policies with a value head on their trunk, and a critic of its own. Under them lie plain transformers models.

`save_pretrained` writes a plain Hugging Face directory with `value_head.safetensors` beside the weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from common.errors import UserError
from common.freezing import find_blocks
from common.lora import add_adapters, is_lora, merged_copy
from common.model_source import check_model_source
from common.models.backbone import hidden_size
from common.models.load import Dtype, load_generator, load_weights, quiet
from common.models.reward import RewardModel

VALUE_HEAD_FILE = "value_head.safetensors"

_LOAD_IT = "is transformers' own; load the model with AutoModelForCausalLM.from_pretrained(…, {}=…) (or Seq2SeqLM) and pass the model"
_NOT_QUANTISED = "weights are not quantised here; dtype='bfloat16' with peft_config=LoraConfig(…) takes half the memory of float32"
_INSTEAD = {
    "load_in_8bit": _NOT_QUANTISED,
    "load_in_4bit": _NOT_QUANTISED,
    "quantization_config": _NOT_QUANTISED,
    "device_map": "leave it out; PPOTrainer moves the model to the GPU where there is one",
    "reward_adapter": "a reward is the trainer's: PPOTrainer(reward=…) or scores for step",
    "is_trainable": "load it with peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER, is_trainable=True) and pass the model",
}
"""What to do instead of an argument that the classic classes took."""


class ValueHead(nn.Module):
    """Hidden states (..., D) -> values (...), float32: one linear layer that starts at zero."""

    def __init__(self, width: int, summary_dropout_prob: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob)
        self.summary = nn.Linear(width, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, states: Tensor) -> Tensor:
        values: Tensor = self.summary(self.dropout(states.to(self.summary.weight.dtype)))
        return values.squeeze(-1)

    def save(self, folder: Path | str) -> None:
        """Write `value_head.safetensors` into an existing folder."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, Path(folder) / VALUE_HEAD_FILE)


class ModelWithValueHead(nn.Module):
    """A text generator (`pretrained_model`, perhaps with LoRA adapters) and `v_head` on its last hidden states."""

    encoder_decoder: ClassVar[bool]

    def __init__(self, pretrained_model: PreTrainedModel | Any, summary_dropout_prob: float = 0.0) -> None:
        super().__init__()
        if bool(pretrained_model.config.is_encoder_decoder) is not self.encoder_decoder:
            kinds = ("a causal model", "an encoder-decoder")
            raise ValueError(
                f"{type(self).__name__} needs {kinds[self.encoder_decoder]}, got {type(pretrained_model).__name__}; "
                f"{kinds[not self.encoder_decoder]} goes into the other class"
            )
        adapters = {config.peft_type.value for config in getattr(pretrained_model, "peft_config", {}).values()}
        if not adapters <= {"LORA"}:
            raise ValueError(f"adapters of kind {', '.join(sorted(adapters))}: only LoRA's can be merged into the weights that are saved")
        self.pretrained_model: Any = pretrained_model
        self.v_head = ValueHead(hidden_size(pretrained_model.config), summary_dropout_prob).to(next(pretrained_model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_model: PreTrainedModel | Path | str | Any,
        *,
        dtype: Dtype | torch.dtype | None = None,
        torch_dtype: Dtype | torch.dtype | None = None,
        trust_remote_code: bool = False,
        peft_config: Any = None,
        summary_dropout_prob: float = 0.0,
        v_head_init_strategy: Literal["normal"] | None = None,
        v_head_initializer_range: float = 0.2,
        **others: Any,
    ) -> Self:
        """Around a model in memory, or one loaded from a directory or hub name; a directory's saved value head (trl's, too) is loaded.

        `dtype` (or `torch_dtype`): of loaded weights, default float32. `peft_config`: a `LoraConfig`; its adapters are added. The value
        head starts at zero, or normal with standard deviation `v_head_initializer_range`. Raises UserError for any other argument,
        saying what to do instead.
        """
        refused = [name for name, value in others.items() if value not in (None, False)]
        if refused:
            raise UserError(*(f"{cls.__name__}.from_pretrained: {name}: {_INSTEAD.get(name, _LOAD_IT).format(name)}" for name in refused))
        if v_head_init_strategy not in (None, "normal"):
            raise UserError(f"v_head_init_strategy: got {v_head_init_strategy!r}, expected None (zeros) or normal")
        pretrained: Any = name_or_model
        folder: Path | None = None
        if isinstance(name_or_model, str | Path):
            folder = Path(name_or_model)
            if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
                raise UserError(f"{folder} holds an adapter without its model; {_INSTEAD['is_trainable']}")
            if not (folder / "config.json").is_file():  # nothing to load: say so at once, instead of asking the hub for a minute
                check_model_source(str(name_or_model), setting=f"{cls.__name__}.from_pretrained", trust_remote_code=trust_remote_code)
            loaded_as = _dtype_name(dtype or torch_dtype or "float32")
            pretrained = load_generator(str(name_or_model), dtype=loaded_as, trust_remote_code=trust_remote_code)
        elif dtype or torch_dtype or trust_remote_code:
            raise UserError("dtype and trust_remote_code have no effect on a model that is loaded already; leave them out")
        model = cls(add_adapters(pretrained, peft_config) if peft_config is not None else pretrained, summary_dropout_prob)
        if v_head_init_strategy == "normal":
            nn.init.normal_(model.v_head.summary.weight, std=v_head_initializer_range)
        if folder is not None:
            _load_saved_head(model.v_head, folder)
        return model

    @property
    def config(self) -> Any:
        """The configuration of the model underneath."""
        return self.pretrained_model.config

    @property
    def device(self) -> torch.device:
        return self.v_head.summary.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits (B, S, V) in float32, the loss where `labels` are given, and values (B, S), as in the classic class."""
        output = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **inputs
        )
        states = output.decoder_hidden_states if self.encoder_decoder else output.hidden_states
        return output.logits.float(), output.loss, self.v_head(states[-1])

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """transformers' own `generate`; `PPOTrainer.generate` is the faster one."""
        return self.pretrained_model.generate(*arguments, **options)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model (adapters merged) and its value head; a plain transformers model loads from the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        plain = merged_copy(self.pretrained_model) if is_lora(self.pretrained_model) else self.pretrained_model
        with quiet():
            plain.save_pretrained(str(folder))
        self.v_head.save(folder)


class AutoModelForCausalLMWithValueHead(ModelWithValueHead):
    """A causal policy with its value head."""

    encoder_decoder = False


class AutoModelForSeq2SeqLMWithValueHead(ModelWithValueHead):
    """An encoder-decoder policy; the value head reads the decoder."""

    encoder_decoder = True


def _load_saved_head(head: ValueHead, folder: Path) -> None:
    """Take over the value head of a directory that has one: in its own file, or where trl put it, among the weights."""
    if (folder / VALUE_HEAD_FILE).is_file():
        load_weights(head, folder / VALUE_HEAD_FILE)
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        load_weights(head, folder / SAFE_WEIGHTS_NAME, prefix="v_head.")


def _dtype_name(dtype: Dtype | torch.dtype) -> Dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        raise UserError(f"dtype: got {dtype}, expected {', '.join(get_args(Dtype))}")
    return cast(Dtype, name)


def with_value_head(model: PreTrainedModel | Any) -> ModelWithValueHead:
    """The class that fits the model."""
    kind = AutoModelForSeq2SeqLMWithValueHead if model.config.is_encoder_decoder else AutoModelForCausalLMWithValueHead
    return kind(model)


class Critic(nn.Module):
    """A value model of its own: a transformer without output layer, and a value head.

    Started from a reward model it takes its backbone and, where that model reads the last token, its head too. The value before
    token t reads prompt and tokens before t, so at the start it is the reward model's score of the answer as far as it is written
    there, on the scale (`mean`, `scale`, `weight`) that PPO sees.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.v_head = ValueHead(hidden_size(trunk.config))

    @classmethod
    def from_reward_model(cls, reward: RewardModel, *, mean: float = 0.0, scale: float = 1.0, weight: float = 1.0) -> Critic:
        """Copy a reward model; values are weight * (score - mean) / scale. `reward` itself stays as it is."""
        critic = cls(copy.deepcopy(reward.backbone))
        head = reward.readout.linear_weight()
        if head is not None:
            with torch.no_grad():
                critic.v_head.summary.weight.copy_(head * (weight / scale))
                critic.v_head.summary.bias.fill_(-mean * weight / scale)
        return critic

    @property
    def config(self) -> Any:
        return self.trunk.config


def reference_copy(model: Any, *, share_frozen: bool = True) -> Any:
    """A frozen copy of the policy as it is, adapters and all; parameters that do not train are shared with it unless told otherwise."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if share_frozen and not parameter.requires_grad}
    reference = copy.deepcopy(model, memo=dict(shared))
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return reference.eval()


def create_reference_model(model: ModelWithValueHead, num_shared_layers: int | None = None) -> ModelWithValueHead:
    """A frozen copy of a policy. The embeddings and the first `num_shared_layers` blocks are frozen in the policy too, and shared."""
    if num_shared_layers is not None:
        freeze_below(model.pretrained_model, num_shared_layers)
    reference: ModelWithValueHead = reference_copy(model)
    return reference


def freeze_below(model: nn.Module, layers: int) -> None:
    """Freeze the embeddings and the first `layers` blocks. Raises ValueError where there are not so many."""
    blocks = find_blocks(model)
    count = len(blocks)
    if not 0 < layers <= count:
        raise ValueError(f"num_shared_layers {layers} is not between 1 and the model's {count} layers")
    below = tuple(block.prefix for block in blocks if block.index < layers)
    embeddings = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(below) or id(parameter) in embeddings:
            parameter.requires_grad_(False)
