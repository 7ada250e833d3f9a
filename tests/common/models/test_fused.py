"""Fused parts: the same numbers as transformers' own, in every way a model is run, and nothing else about the model changes."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoModel,
    PreTrainedModel,
    StaticCache,
)
from transformers.activations import ACT2FN
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from common.collate import packed_batch, right_pad, supports_packing
from common.freezing import parameter_groups
from common.lora import add_lora
from common.models import fused
from common.models.fused import FusedGPTNeoSelfAttention, FusedNewGELU, set_fused
from common.models.load import build_backbone, build_generator, load_backbone, load_generator, train_tokenizer
from common.models.prepacked import prepacked
from common.models.recompute import recompute_activations
from common.optim import make_optimizer
from common.schema import LoraSettings, ModelInit
from common.tokenization import Encoded
from reward_model.config import ClassificationConfig
from reward_model.training import prepare_model, start_model
from rlhf.config import PPORunConfig
from rlhf.training import load_policy
from sft.config import SFTConfig
from sft.training import load_model

WINDOW = 5
LENGTHS = (20, 13, 7, 2)


def gpt_neo(**settings: Any) -> GPTNeoForCausalLM:
    """Two global and two local layers with weights large enough for attention to be far from uniform."""
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW}
    ids = {"vocab_size": 50, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    dropout = {"attention_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0}
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(GPTNeoConfig(**(sizes | ids | dropout | {"initializer_range": 0.2} | settings)))
    return model.eval()


@pytest.fixture
def model() -> GPTNeoForCausalLM:
    return gpt_neo()


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 50, (length,), generator=generator).tolist() for length in lengths]


def batch(padding: str) -> dict[str, Tensor]:
    """Inputs of the model: rows of several lengths, padded left or right, without padding, or packed."""
    if padding == "packed":
        encoded = [Encoded(row[:1], row[1:]) for row in rows()]
        packed = packed_batch(encoded, pad_id=0, capacity=24)
        return {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
    if padding == "none":
        return {"input_ids": torch.tensor(rows((20, 20, 20)))}
    ids, mask = right_pad(rows(), 0)
    if padding == "left":
        ids, mask = (torch.stack([row.roll(20 - length) for row, length in zip(x, LENGTHS, strict=True)]) for x in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Equal to float32 rounding, relative to the largest number."""
    scale = float(expected.detach().abs().max())
    assert scale > 0
    assert float((actual - expected).detach().abs().max()) <= rtol * scale


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean log-probability of the next real token, and its gradient by every parameter."""
    model.zero_grad(set_to_none=True)
    logits = model(**inputs, use_cache=False).logits
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    targets = inputs["input_ids"].masked_fill(~real, -100)
    targets[:, 1:].masked_fill_(~real[:, :-1], -100)  # the first token behind left padding has no predecessor
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["none", "right", "left", "packed"])
@pytest.mark.parametrize("window", [WINDOW, 40])  # shorter and longer than the rows
def test_logits_of_real_tokens_are_the_same(padding: str, window: int) -> None:
    model, inputs = gpt_neo(window_size=window), batch(padding)
    expected = model(**inputs, use_cache=False).logits
    assert set_fused(model) == ()
    actual = model(**inputs, use_cache=False).logits
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    close(actual[real], expected[real])
    assert bool(actual.isfinite().all())


@pytest.mark.parametrize("padding", ["none", "right", "left", "packed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_same(model: GPTNeoForCausalLM, padding: str, recompute: bool) -> None:
    inputs = batch(padding)
    expected_loss, expected = loss_and_gradients(model, inputs)
    set_fused(model)
    if recompute:
        recompute_activations(model)
        model.train()
    loss, gradients = loss_and_gradients(model, inputs)
    close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])


def test_the_window_is_in_use(model: GPTNeoForCausalLM) -> None:
    """A token further back than the window changes nothing when all layers are local and there is but one of them."""
    model = gpt_neo(num_layers=1, attention_types=[[["local"], 1]])
    set_fused(model)
    ids = torch.tensor([rows((20,))[0]])
    other = ids.clone()
    other[0, 20 - 1 - WINDOW] += 1
    last = model(ids).logits[0, -1]
    torch.testing.assert_close(model(other).logits[0, -1], last, rtol=0, atol=1e-6)
    other[0, 20 - WINDOW] += 1
    assert not torch.allclose(model(other).logits[0, -1], last, atol=1e-3)


def decode(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any, chunks: tuple[int, ...]) -> Tensor:
    """Logits (B, S, V) when the inputs are fed through a cache piece by piece."""
    logits, done = [], 0
    for chunk in chunks:
        part = {name: value[:, done : done + chunk] for name, value in inputs.items() if name != "attention_mask"}
        mask = inputs["attention_mask"][:, : done + chunk]
        logits.append(model(**part, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        done += chunk
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(12, *[1] * 8), (3, 4, 1, 5, 7), (20,)])
def test_a_cache_changes_nothing(model: GPTNeoForCausalLM, kind: str, chunks: tuple[int, ...]) -> None:
    inputs = batch("left")
    expected = model(**inputs, use_cache=False).logits
    set_fused(model)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    actual = decode(model, inputs, cache, chunks)
    real = inputs["attention_mask"].bool()
    close(actual[real], expected[real])


@torch.no_grad()
@pytest.mark.parametrize("implementation", [None, "static"])
def test_sampled_tokens_are_the_same(model: GPTNeoForCausalLM, implementation: str | None) -> None:
    inputs = {name: value for name, value in batch("left").items() if name != "position_ids"}

    def sample(**options: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(**inputs, do_sample=True, max_new_tokens=24, eos_token_id=None, pad_token_id=0, **options)

    expected = sample()
    set_fused(model)
    assert torch.equal(sample(cache_implementation=implementation), expected)


@torch.no_grad()
def test_a_mask_of_the_users_own_is_obeyed_and_may_change_in_place(model: GPTNeoForCausalLM) -> None:
    ids = batch("none")["input_ids"]
    lowest = torch.finfo(torch.float32).min
    open_mask, no_third = torch.zeros(3, 1, 20, 20), torch.zeros(3, 1, 20, 20)
    no_third[..., 3:-1, 2] = lowest  # the last query sees it
    expected = [model(ids, attention_mask=mask).logits for mask in (open_mask, no_third)]
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    set_fused(model)
    mask = open_mask.clone()
    close(model(ids, attention_mask=mask).logits, expected[0])
    mask.copy_(no_third)
    close(model(ids, attention_mask=mask).logits, expected[1])


def test_masks_are_finite_where_causality_hides_nothing_and_left_out_where_it_is_all() -> None:
    """Every query sees something finite, hidden by padding or not: kernels on a GPU would make NaN of a line of -inf."""
    lowest, visible = torch.finfo(torch.float32).min, torch.ones(4, 4).tril().bool()
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~visible, lowest)
    assert fused._make_visible(mask, 4, 0, None, torch.float32) is None
    assert fused._make_visible(mask, 4, 0, 4, torch.float32) is None
    assert fused._make_visible(mask, 4, 0, 3, torch.float32) is not None
    mask[..., 0] = lowest  # left padding: the first query sees nothing
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = fused._make_visible(mask, 4, 0, None, dtype)
        assert made is not None and made.dtype == dtype
        assert bool(made[0, 0][visible].isfinite().all()) and bool((made[0, 0][~visible] == -torch.inf).all())
        step = fused._make_visible(mask[..., :1, :], 1, 3, None, dtype)
        assert step is not None and bool(step.isfinite().all())


@torch.no_grad()
def test_short_types_round_less_and_never_give_nan() -> None:
    """In bfloat16 weights and under autocast the fused forms are no further from float32 than transformers' own."""
    exact, inputs = gpt_neo(), batch("left")
    real = inputs["attention_mask"].bool()
    expected = exact(**inputs).logits[real]
    short = copy.deepcopy(exact).to(torch.bfloat16)
    plain_error = float((short(**inputs).logits[real].float() - expected).abs().mean())
    set_fused(short)
    assert float((short(**inputs).logits[real].float() - expected).abs().mean()) <= 1.1 * plain_error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_error = float((exact(**inputs).logits[real].float() - expected).abs().mean())
        set_fused(exact)
        logits = exact(**inputs).logits
    assert bool(logits.isfinite().all())
    assert float((logits[real].float() - expected).abs().mean()) <= 1.1 * plain_error


@torch.no_grad()
def test_with_prepacked_weights_the_activation_is_part_of_the_product(model: GPTNeoForCausalLM) -> None:
    inputs = batch("none")
    set_fused(model)
    expected, ran = model(**inputs).logits, []
    for block in model.transformer.h:
        block.mlp.act.register_forward_hook(lambda *_: ran.append(True))
    with prepacked(model):
        close(model(**inputs).logits, expected)
        assert not ran
        with torch.enable_grad():
            close(model(**inputs).logits, expected)
    model(**inputs)
    assert len(ran) == 4


@torch.no_grad()
def test_in_bfloat16_a_cpus_cache_is_float32_and_answers_no_worse() -> None:
    exact, ids = gpt_neo(initializer_range=0.1), torch.tensor(rows((12, 12)))
    set_fused(exact)
    short, cache = copy.deepcopy(exact).to(torch.bfloat16), DynamicCache()
    expected, whole = (model(ids).logits[:, -1] for model in (exact, short))
    short(ids[:, :-1], past_key_values=cache, use_cache=True)
    last = short(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert last.dtype == torch.bfloat16 and {layer.keys.dtype for layer in cache.layers} == {torch.float32}
    assert float((last.float() - expected).norm()) < 1.2 * float((whole.float() - expected).norm())


@torch.no_grad()
def test_masks_are_made_once_for_each_kind_of_layer_and_live_as_long_as_their_forward(
    model: GPTNeoForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    make = fused._make_visible

    def counted(*arguments: Any) -> Tensor | None:
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(fused, "_make_visible", counted)
    set_fused(model)
    model(**batch("right"), use_cache=False)
    assert len(calls) == 2  # global and local, two layers each
    calls.clear()
    assert len(fused._made) == 0


def test_dropout_on_the_weights_runs_transformers_own_code() -> None:
    """With dropout on attention weights a seed gives the numbers it gave; in eval mode the kernel is back."""
    model = gpt_neo(attention_dropout=0.3).train()
    inputs = batch("right")
    torch.manual_seed(5)
    expected = model(**inputs).logits
    (note,) = set_fused(model)
    assert note.startswith("attention with dropout on its weights trains as it is in transformers")
    torch.manual_seed(5)
    close(model(**inputs).logits, expected)
    model.eval()
    attention = model.transformer.h[0].attn.attention
    assert attention(torch.ones(1, 3, 32), torch.zeros(1, 1, 3, 3))[1] is None


def test_attention_weights_are_there_when_asked_for(model: GPTNeoForCausalLM) -> None:
    inputs = batch("right")
    expected = model(**inputs, output_attentions=True).attentions
    set_fused(model)
    for actual, weights in zip(model(**inputs, output_attentions=True).attentions, expected, strict=True):
        close(actual, weights)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_tanh_gelu_and_its_gradient(name: str) -> None:
    module = nn.Sequential(ACT2FN[name])
    x = torch.linspace(-8, 8, 4001, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        y = module(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    expected, expected_gradient = run()
    assert set_fused(module) == ()
    assert type(module[0]).__name__.startswith("Fused")
    actual, gradient = run()
    for ours, theirs in ((actual, expected), (gradient, expected_gradient)):  # large inputs, and those around zero
        close(ours, theirs, rtol=1e-6)
        close(ours[1900:2100], theirs[1900:2100], rtol=1e-6)
    assert float(module(torch.tensor(1.0))) == pytest.approx(0.841191990, abs=1e-6)  # (1 + tanh(sqrt(2 / pi) * 1.044715)) / 2


@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "silu", "relu"])
def test_other_activations_stay(name: str) -> None:
    module = nn.Sequential(ACT2FN[name])
    kind = type(module[0])
    assert set_fused(module) == ()
    assert type(module[0]) is kind


def test_switching_off_brings_back_the_classes_and_the_numbers(model: GPTNeoForCausalLM) -> None:
    inputs = batch("right")
    kinds = [type(module) for module in model.modules()]
    expected = model(**inputs).logits
    set_fused(model)
    set_fused(model)  # again changes nothing
    assert [type(module) for module in model.modules()] != kinds
    set_fused(model, False)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(**inputs).logits, expected)


def test_names_weights_configuration_and_groups_stay(model: GPTNeoForCausalLM, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    config, groups = model.config.to_dict(), parameter_groups(model)
    set_fused(model)
    assert model.config.to_dict() == config
    assert parameter_groups(model) == groups
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "fused")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").transformer.h[0].attn.attention) is GPTNeoSelfAttention


def test_a_sequence_classifier_keeps_its_scores(model: GPTNeoForCausalLM, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = batch("right")
    expected = classifier(**inputs).logits
    set_fused(classifier)
    close(classifier(**inputs).logits, expected)
    classifier.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()(**inputs).logits, expected)


def test_deep_copies_and_pickles_are_models_of_their_own(model: GPTNeoForCausalLM) -> None:
    inputs = batch("right")
    set_fused(model)
    expected = model(**inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        assert isinstance(other.transformer.h[1].attn.attention, FusedGPTNeoSelfAttention)
        assert torch.equal(other(**inputs).logits, expected)


def test_adapters_wrap_a_fused_model(model: GPTNeoForCausalLM) -> None:
    inputs = batch("right")
    settings = LoraSettings(r=2, target_modules=["q_proj", "v_proj", "c_fc"])
    losses = []
    for enabled in (False, True):
        wrapped = add_lora(copy.deepcopy(model), settings, seed=0)
        set_fused(wrapped, enabled)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        losses.append(loss_and_gradients(wrapped, inputs))
    close(losses[1][0], losses[0][0])
    assert losses[1][1].keys() == losses[0][1].keys() and losses[0][1]
    for name, gradient in losses[0][1].items():
        close(losses[1][1][name], gradient)


def test_packing_is_still_recognised(model: GPTNeoForCausalLM) -> None:
    set_fused(model)
    assert supports_packing(model)


def test_fused_adamw_is_adamw(model: GPTNeoForCausalLM) -> None:
    """Five steps of the project's optimizer and of torch's loop over tensors lead to the same weights."""
    other, inputs = copy.deepcopy(model), batch("right")
    ours = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1)
    assert ours.defaults["fused"]
    matrices = [parameter for parameter in other.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in other.parameters() if parameter.ndim < 2]
    looped = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=ours.defaults["betas"],
        foreach=False,
    )
    for _ in range(5):
        for each, optimizer in ((model, ours), (other, looped)):
            loss_and_gradients(each, inputs)
            optimizer.step()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        close(parameter.detach(), expected.detach())


# --- where it is on, and where it is refused ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([], 258)


def test_loaders_give_fused_models(tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    init = ModelInit(model_type="gpt_neo", config=sizes)
    generator = build_generator(init, tokenizer, 32, 0)
    generator.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (generator, build_backbone(init, tokenizer, 32, 0), load_generator(str(tmp_path)), load_backbone(str(tmp_path))):
        kinds = {type(module) for module in model.modules()}
        assert {FusedGPTNeoSelfAttention, FusedNewGELU} <= kinds
        assert GPTNeoSelfAttention not in kinds


def test_gpt2_gets_its_activation_and_keeps_its_attention() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = batch("right")
    expected = model(**inputs).logits
    attention = type(model.transformer.h[0].attn)
    assert set_fused(model) == ()
    assert type(model.transformer.h[0].mlp.act) is FusedNewGELU
    assert type(model.transformer.h[0].attn) is attention
    real = inputs["attention_mask"].bool()
    close(model(**inputs).logits[real], expected[real])


def test_eager_attention_of_other_models_stays_with_a_note() -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **sizes))
    (note,) = set_fused(model)
    assert note.startswith("gptj runs with transformers' eager attention")
    assert set_fused(model, False) == ()


@pytest.fixture
def changed_interface(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forward(self: Any, hidden_states: Tensor, position_embeddings: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(GPTNeoSelfAttention, "forward", forward)
    yield


@pytest.mark.usefixtures("changed_interface")
def test_a_class_of_another_interface_stays_with_a_note(model: GPTNeoForCausalLM) -> None:
    notes = set_fused(model)
    assert "GPTNeoSelfAttention has changed in this version of transformers and stays as it is there" in notes
    assert type(model.transformer.h[0].attn.attention) is GPTNeoSelfAttention
    assert type(model.transformer.h[0].mlp.act) is FusedNewGELU


def test_a_subclass_may_compute_something_else_and_stays() -> None:
    class Louder(GPTNeoSelfAttention):
        pass

    model = gpt_neo()
    model.transformer.h[0].attn.attention.__class__ = Louder
    set_fused(model)
    assert type(model.transformer.h[0].attn.attention) is Louder


def test_interfaces_are_those_of_the_installed_version() -> None:
    for kind, expected in fused._INTERFACES.items():
        assert tuple(inspect.signature(kind.forward).parameters)[1:] == expected


@pytest.mark.parametrize("on", [True, False])
def test_every_stage_reads_the_switch(tokenizer: Any, tmp_path: Path, on: bool) -> None:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    init = {"model_type": "gpt_neo", "config": sizes, "vocab_size": 258}
    build_generator(ModelInit(**init), tokenizer, 512, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = {"data_dir": str(tmp_path)}
    sft = SFTConfig(data=data, model_name=str(tmp_path), fused=on)
    reward = ClassificationConfig(data=data, model_init=init, fused=on)
    ppo = PPORunConfig(
        data_config={"data_file_path": str(tmp_path)},
        ppo_config={"model_name": str(tmp_path)},
        reward_config={"reward_model_name": str(tmp_path)},
        fused=on,
    )
    scorer = start_model(reward, ["text"])[1]
    prepare_model(scorer, reward)
    for model in (load_model(sft, [])[0], scorer, load_policy(ppo, tokenizer, 0)[0]):
        kinds = {type(module) for module in model.modules()}
        assert (FusedGPTNeoSelfAttention in kinds, FusedNewGELU in kinds) == (on, on)


def test_the_activation_is_computed_anew_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = fused.gelu
    monkeypatch.setattr(fused, "gelu", lambda input, approximate: calls.append(1) or original(input, approximate=approximate))
    torch.manual_seed(0)
    model = GPTNeoModel(GPTNeoConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]))
    set_fused(model)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    output = model.h[0].mlp(hidden)
    assert len(calls) == 1
    output.sum().backward()
    assert len(calls) == 2
    # Autograd holds the hook that keeps tensors, and with it whatever it refers to.
    pack = fused._computed_anew(original(hidden), hidden).pack_hook
    assert not [cell for cell in pack.__closure__ if isinstance(cell.cell_contents, Tensor)]
