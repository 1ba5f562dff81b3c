"""LoRA layers on bf16 weights, read in bf16: the formula, PEFT's own layer, and what is left to it."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from lightning_modules.models.loading import LoraSettings, ModelConfig, load_model
from lightning_modules.models.low_rank import LowRankLinear, _LowRank, shorten


def adapted(dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0, **settings: object) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=dropout, **settings)
        peft = get_peft_model(model, config)
        for name, parameter in peft.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.2)
    return peft


def layer_of(model: PeftModel) -> nn.Module:
    return model.base_model.model[0]


def passes(model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """The output and the gradients of input, A and B, of a loss that weighs all outputs differently."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 64, generator=rng).to(dtype).requires_grad_()
    weights = torch.randn(3, 5, 32, generator=rng)
    model.zero_grad()
    torch.manual_seed(2)  # of the dropout
    y = model(x)
    (y.float() * weights).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora" in name]
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_are_those_of_the_formula(dropped):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    weight, bias, mask = draw(5, 8), draw(5), (draw(6, 8) > 0).double() / 0.5
    x, a, b = (t.requires_grad_() for t in (draw(6, 8), draw(2, 8), draw(5, 2)))

    def layer(x, a, b):
        return _LowRank.apply(x, x * mask if dropped else None, weight, bias, a, b, 0.7)

    read = x * mask if dropped else x
    expected = x @ weight.T + bias + 0.7 * (read @ a.T) @ b.T
    torch.testing.assert_close(layer(x, a, b), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(layer, (x, a, b))
    # One of them alone, too.
    assert torch.autograd.gradcheck(lambda own: layer(x.detach(), own, b.detach()), (a,))
    assert torch.autograd.gradcheck(lambda own: layer(x.detach(), a.detach(), own), (b,))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_it_agrees_with_peft_to_the_rounding_of_bf16(dropout):
    plain = adapted(dropout=dropout).train()
    short = shorten(copy.deepcopy(plain))
    assert type(layer_of(short)) is LowRankLinear and type(layer_of(plain)) is not LowRankLinear
    for own, pefts in zip(passes(short), passes(plain), strict=True):
        assert own.dtype == pefts.dtype and own.shape == pefts.shape
        assert (own.float() - pefts.float()).norm() <= 0.01 * pefts.float().norm()


def test_it_is_no_further_from_exact_arithmetic_than_twice_pefts_distance():
    plain = adapted()
    exact = passes(copy.deepcopy(plain).double(), torch.float64)
    for own, pefts, true in zip(passes(shorten(copy.deepcopy(plain))), passes(plain), exact, strict=True):
        # PEFT rounds its gradients of fp32 adapters in their inputs alone; 2^-9 is a rounding to bf16.
        allowed = 2 * (pefts - true).norm() + 2**-9 * true.norm()
        assert (own - true).norm() <= allowed


def test_adapters_keep_fp32_so_that_steps_below_the_rounding_of_bf16_add_up():
    model = shorten(adapted())
    weight = layer_of(model).lora_A["default"].weight
    before = weight.detach().bfloat16()
    passes(model)
    step = 1e-7 * weight.grad.sign()
    with torch.no_grad():
        weight -= step
        assert weight.dtype == torch.float32 and (weight.bfloat16() == before).float().mean() > 0.99
        for _ in range(20_000):
            weight -= step
        assert (weight.bfloat16() == before).float().mean() < 0.2


def test_frozen_adapters_keep_nothing_of_their_input():
    model = shorten(adapted()).requires_grad_(False)
    x = torch.randn(40, 64).bfloat16().requires_grad_()
    learning = shorten(adapted())
    kept = [own(x).grad_fn.next_functions[0][0].saved_tensors for own in (model, learning)]
    assert [*map(len, kept)] == [3, 5]  # weight, A, B; x, x A^T


def test_what_is_switched_off_or_merged_is_the_base():
    model = shorten(adapted())
    x = torch.randn(4, 64).bfloat16()
    base = layer_of(model).get_base_layer()(x)
    assert not torch.equal(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.merge_adapter()
    merged = model(x)
    assert not torch.equal(merged, base)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), merged, atol=0.05, rtol=0.05)


def second(model: PeftModel) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=2, lora_alpha=10, target_modules=["0"], init_lora_weights=False)
        model.add_adapter("second", config)


def test_the_active_adapter_is_read_by_its_own_weights_and_scale():
    plain = adapted()
    second(plain)
    plain.set_adapter("second")
    x = torch.randn(4, 64).bfloat16()
    first_alone = adapted()(x)
    short = shorten(copy.deepcopy(plain))
    assert type(layer_of(short)) is LowRankLinear and not torch.equal(plain(x), first_alone)
    torch.testing.assert_close(short(x), plain(x), atol=0.05, rtol=0.02)
    # An adapter that this layer has not is none, as for PEFT.
    layer_of(short)._active_adapter = ["another"]
    assert torch.equal(short(x), layer_of(short).get_base_layer()(x))


def test_a_base_that_learns_learns():
    for names in (("weight",), ("bias",), ("weight", "bias")):
        model = shorten(adapted())
        for name in names:
            getattr(layer_of(model).get_base_layer(), name).requires_grad_()
        passes(model)
        assert all(getattr(layer_of(model).get_base_layer(), name).grad is not None for name in names)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (0, 64), (2, 0, 64)])
def test_any_number_of_rows_whose_output_may_be_changed_in_place(shape):
    model = shorten(adapted())
    y = model(torch.randn(shape).bfloat16())
    assert y.shape == (*shape[:-1], 32)
    expected = y.detach().clamp(-0.1, 0.1)
    assert torch.equal(y.clamp_(-0.1, 0.1), expected)
    y.sum().backward()


def test_neither_weights_nor_adapters_are_touched():
    model = shorten(adapted())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    passes(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_autocast_to_the_same_dtype_changes_nothing():
    model = shorten(adapted())
    x = torch.randn(4, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_a_loaded_model_has_them_on_a_bf16_base_alone():
    def kinds(dtype: str) -> set[type]:
        model = load_model(ModelConfig("tinychat:aligned", dtype=dtype, lora=LoraSettings(r=2)))
        return {type(part) for part in model.modules() if isinstance(part, LoraLinear)}

    assert kinds("bfloat16") == {LowRankLinear}
    assert kinds("float32") == kinds("float16") == {LoraLinear}


@pytest.mark.parametrize(
    "kind", ["fp32", "fp16", "dora", "biased", "two adapters", "by row", "autocast to fp16", "other input"]
)
def test_what_is_not_plain_lora_on_bf16_goes_pefts_way(kind, monkeypatch):
    settings = {"dora": {"use_dora": True}, "biased": {"lora_bias": True}}.get(kind, {})
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(kind, torch.bfloat16)
    plain = adapted(dtype, **settings).eval()
    if kind in ("two adapters", "by row"):
        second(plain)
    if kind == "two adapters":
        plain.base_model.set_adapter(["default", "second"])
    short = shorten(copy.deepcopy(plain))

    def never(*_: object) -> None:
        raise AssertionError("the short way")

    monkeypatch.setattr(_LowRank, "apply", never)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x = x if kind == "other input" else x.to(dtype)
    if kind == "by row":
        names = ["default", "second", "second", "default"]
        assert torch.equal(short(x, adapter_names=names), plain(x, adapter_names=names))
    elif kind == "autocast to fp16":
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(short(x), plain(x))
    elif kind == "other input":
        with pytest.raises(RuntimeError, match="dtype"):
            short(x)
    else:
        assert torch.equal(short(x), plain(x))


def test_a_linear_layer_that_computes_something_else_keeps_its_own_way():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = get_peft_model(nn.Sequential(Doubled(64, 32).bfloat16()), LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(4, 64).bfloat16()
    assert torch.equal(shorten(model)(x), layer_of(model).get_base_layer()(x))  # B is zero yet


def test_a_second_derivative_is_refused_and_not_left_out():
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(shorten(adapted())(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_saved_adapters_are_pefts(tmp_path):
    model = shorten(adapted())
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    again = PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(4, 64).bfloat16()
    torch.testing.assert_close(again(x), model(x), atol=0.05, rtol=0.02)
