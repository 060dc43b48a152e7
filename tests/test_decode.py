"""A decoding step by kernels gives what the modules of the layers give, and steps aside where it would not."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from cases import CASES
from small_models import assert_close, random_ids, small_model
from transformers import DynamicCache, StaticCache

decode_numba = pytest.importorskip("modeling_minrnn.decode_numba")

FUSED = [cell for cell in CASES.values() if decode_numba.code_of(cell) >= 0 or cell.has_matrices]
SHAPES = {
    "plain": {},
    "bare": {"conv_kernel_size": 0, "intermediate_size": 0, "learned_initial_state": False},
    "all": {"conv_kernel_size": 2, "mlp_bias": True, "hidden_act": "silu", "output_gate": True},
    "one token": {"conv_kernel_size": 1, "hidden_act": "relu", "intermediate_size": 5},
}


@pytest.fixture
def decoded(monkeypatch):
    """A number for each call of a kernel, which decodes all layers of one cell that follow each other."""
    calls = []
    kernel_of = decode_numba.layers_kernel_of
    monkeypatch.setattr(decode_numba, "layers_kernel_of", lambda *of: (calls.append(1), kernel_of(*of))[1])
    return calls


def model_of(cell, **fields):
    options = dataclasses.asdict(cell)
    size = {"hidden_size": 14, "expansion_factor": 2}
    return small_model(cell.name, **size | options | fields)


def quantised(model, scheme="Int8WeightOnlyConfig", **options):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.model.layers, getattr(torchao, scheme)(**options))
    return model


def two_steps(model, ids, kind=DynamicCache, **options):
    """Logits of a prompt's last token and of two more, one by one, and the states after them."""
    cache = kind(config=model.config, **options)
    with torch.no_grad():
        logits = [model(part, past_key_values=cache, use_cache=True).logits[:, -1] for part in ids.split([5, 1, 1], 1)]
    return torch.stack(logits), [x for layer in cache.layers for x in (layer.keys, layer.values)]


def relative_error(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


def by_modules(model, *arguments, **options):
    model = copy.deepcopy(model)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    return two_steps(model, *arguments, **options)


@pytest.mark.parametrize("cell", FUSED, ids=lambda cell: cell.spec)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_step_by_kernels_is_that_of_the_modules_for_every_cell_and_batch(cell, rows, decoded):
    model = model_of(cell, max_timescale=30 if cell.remembers_by else None)
    ids = random_ids(rows, 7)
    found, expected = two_steps(model, ids), by_modules(model, ids)
    assert len(decoded) == 2
    for x, y in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("static", [False, True])
def test_every_part_of_a_layer_is_computed(shape, static, decoded):
    model = model_of(CASES["minlstm"], **SHAPES[shape])
    kind = {"kind": StaticCache, "max_cache_len": 9} if static else {}
    found, expected = two_steps(model, random_ids(2, 7), **kind), by_modules(model, random_ids(2, 7), **kind)
    assert decoded
    for x, y in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("cell", [CASES[name] for name in ("mingru", "rwkv4")], ids=lambda cell: cell.spec)
def test_eight_bit_weights_decode_as_the_modules_have_them(cell, decoded):
    model = quantised(model_of(cell, hidden_size=13, output_gate=True, mlp_bias=True))
    for rows in (1, 3):
        found, expected = two_steps(model, random_ids(rows, 7)), by_modules(model, random_ids(rows, 7))
        for x, y in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
            assert_close(x, y)
    assert len(decoded) == 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", [CASES[name] for name in ("minlstm", "rwkv4")], ids=lambda cell: cell.spec)
def test_bfloat16_weights_decode_as_they_are_read_at_once(cell, shape, decoded):
    model = model_of(cell, **{"hidden_size": 60} | SHAPES[shape], dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    for rows in (1, 3):
        ids = random_ids(rows, 7)
        cache = DynamicCache(config=model.config)
        logits, kept = two_steps(model, ids)
        with torch.no_grad():
            at_once = model(ids, past_key_values=cache).logits[:, 4:].transpose(0, 1)
        error = relative_error(at_once, two_steps(exact, ids)[0])
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits, at_once) < 0.2 * error  # rounded where the modules round
        for x, y in zip(kept, [x for layer in cache.layers for x in (layer.keys, layer.values)], strict=True):
            assert x.dtype == y.dtype
            assert x.numel() == 0 or relative_error(x, y) < 1e-3
        first = cache.layers[0].values  # of embeddings, which nothing has rounded
        assert torch.equal(kept[1], first)
    assert len(decoded) == 8


@pytest.mark.parametrize("width, change", [(37, lambda model: model), (37, quantised), (500, lambda model: model)])
def test_a_row_does_not_depend_on_the_others_of_its_batch_to_the_last_bit(width, change, decoded):
    model, ids = change(model_of(CASES["minlstm"], hidden_size=width)), random_ids(9, 7)  # of 500: not IN_CACHE
    assert_close(two_steps(model, ids[:1])[0], by_modules(model, ids[:1])[0])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        alone = [copy.deepcopy(cache) for _ in ids]
        for i, each in enumerate(alone):
            each.batch_select_indices(torch.tensor([i]))
        embedded = model.model.embed_tokens(ids[:, 5:6])
        for rows in (2, 3, 8, 9):
            together = copy.deepcopy(cache)
            together.batch_select_indices(torch.arange(rows))
            found = model.model(inputs_embeds=embedded[:rows], past_key_values=together).last_hidden_state
            for i in range(rows):
                one = copy.deepcopy(alone[i])
                expected = model.model(inputs_embeds=embedded[i : i + 1], past_key_values=one).last_hidden_state
                assert torch.equal(found[i : i + 1], expected), (rows, i)
                for x, y in zip(together.layers, one.layers):
                    assert torch.equal(x.keys[i : i + 1], y.keys) and torch.equal(x.values[i : i + 1], y.values)
    assert decoded


def transpose(layer):
    layer.rnn.out_proj.weight.data = layer.rnn.out_proj.weight.data.T


def prune(layer):
    """To other shapes at the same addresses."""
    up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
    up.data, down.data = up.data[:9], down.data[:, :9]


def unregister(layer):
    weight = layer.mlp.down_proj.weight.detach().clone()
    del layer.mlp.down_proj.weight
    layer.mlp.down_proj.weight = weight


def hook(layer):
    layer.rnn.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0], *arguments[1:]))


def test_a_changed_part_is_seen(decoded):
    model, ids, other = small_model(expansion_factor=1), random_ids(1, 7), small_model(expansion_factor=1, seed=1)
    layers = model.model.layers
    before = two_steps(model, ids)[0]
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: layers[0].rnn.in_proj.weight.data.mul_(2),
        lambda: setattr(layers[1].mlp, "up_proj", torch.nn.Linear(14, 56, bias=False)),
        lambda: setattr(layers[1].rnn_norm, "weight", torch.nn.Parameter(torch.rand(14))),
        lambda: setattr(layers[0].rnn, "out_proj", torch.nn.Linear(14, 14)),
        lambda: [setattr(norm, "eps", 0.5) for layer in layers for norm in (layer.rnn_norm, layer.mlp_norm)],
        lambda: layers.register_module("1", copy.deepcopy(layers[0])),
        lambda: setattr(model.model, "norm", copy.deepcopy(layers[0].rnn_norm)),
        lambda: setattr(model, "lm_head", torch.nn.Linear(14, model.config.vocab_size)),
        lambda: model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False),
    ):
        decoded.clear()
        change()
        found = two_steps(model, ids)[0]
        assert len(decoded) == 2
        assert_close(found, by_modules(model, ids)[0])
        assert found.shape != before.shape or not torch.equal(found, before)
        before = found
    for change in (transpose, prune, unregister, hook):  # to what only the modules compute
        model = small_model(expansion_factor=1)
        before = two_steps(model, ids)[0]
        decoded.clear()
        change(model.model.layers[1])
        found = two_steps(model, ids)[0]
        assert not decoded and (change is unregister or not torch.equal(found, before))
        assert_close(found, by_modules(model, ids)[0])


def test_a_model_that_has_decoded_can_go():
    model = small_model()
    two_steps(model, random_ids(1, 7))
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None


def adapted(model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    return model.eval()


def quantised_with_its_activations(model):
    return quantised(model, "Int8DynamicActivationInt8WeightConfig")


def quantised_by_groups(model):
    granularity = pytest.importorskip("torchao.quantization").PerGroup(7)
    return quantised(model, granularity=granularity)


def quantised_in_part(model):
    quantised(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = torch.nn.Linear(14, 56)
    return model


def hooked(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, arguments, output: output + 1)
    return model


def another_forward(model):
    for layer in model.model.layers:
        layer.rnn.forward = lambda *arguments, forward=layer.rnn.forward: (
            2 * (found := forward(*arguments))[0],
            *found[1:],
        )
    return model


def of_two_dtypes(model):
    for layer in model.model.layers:
        layer.mlp.double()
        layer.mlp.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
        layer.mlp.register_forward_hook(lambda module, arguments, output: output.float())
    return model


def of_another_width(model):
    for layer in model.model.layers:
        layer.mlp.up_proj, layer.mlp.down_proj = torch.nn.Linear(14, 9), torch.nn.Linear(9, 14)
        layer.mlp_norm.eps = 0.5
    return model


def without_weights(model):
    for layer in model.model.layers:
        layer.rnn_norm = torch.nn.RMSNorm(14, elementwise_affine=False)
    return model


class Twice(torch.nn.Module):
    """A part of a user's own, with nothing of the one that it takes the place of."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *arguments):
        found = self.part(*arguments)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found


def replaced(model):
    model.model.layers[0].rnn = Twice(model.model.layers[0].rnn)
    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    return model


def projection_replaced(model):
    for layer in model.model.layers:
        layer.mlp.up_proj = Twice(layer.mlp.up_proj)
        layer.rnn.in_proj = Twice(layer.rnn.in_proj)
    return model


def norm_replaced(model):
    for layer in model.model.layers:
        layer.rnn_norm = Twice(layer.rnn_norm)
    return model


def of_unstated_eps(model):
    for layer in model.model.layers:
        layer.rnn_norm.eps = layer.mlp_norm.eps = None
    return model


CHANGES = [
    replaced, projection_replaced, norm_replaced, of_unstated_eps, adapted, quantised_with_its_activations,
    quantised_by_groups, quantised_in_part, hooked, another_forward, of_two_dtypes, of_another_width, without_weights,
    cpu_offload,
]  # fmt: skip


def reparametrised(model):
    for layer in model.model.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.rnn.out_proj)
    return model


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [*CHANGES, reparametrised], ids=lambda change: change.__name__)
def test_a_layer_that_is_not_the_stock_one_is_computed_by_its_modules(change, decoded):
    model = small_model()
    changed = change(model)
    model = model if changed is None else changed
    found = two_steps(model, random_ids(2, 7))
    assert not decoded
    # A last bit decides which way an activation is rounded to eight bits: 3.5e-3 was seen.
    tolerance = 1e-2 if change is quantised_with_its_activations else None
    with torch.no_grad():
        assert_close(found[0][-1], model(random_ids(2, 7)).logits[:, -1], tolerance)


def test_training_gradients_captured_states_and_other_backends_take_the_modules(decoded):
    ids = random_ids(2, 7)
    model = small_model(dropout=0.5).train()
    two_steps(model, ids)
    model = small_model()
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    with torch.no_grad():
        model(ids[:, :1], past_key_values=DynamicCache(config=model.config), output_hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids[:, :1], past_key_values=DynamicCache(config=model.config))
    two_steps(small_model(scan_backend="torch"), ids)
    for dtype in (torch.float64, torch.float16):
        two_steps(small_model(dtype=dtype), ids)
    assert not decoded


def test_generate_gives_the_tokens_of_the_modules_greedy_sampled_and_by_beams(decoded):
    model, ids = small_model(vocab_size=50, seed=3), random_ids(3, 7)
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.register_forward_hook(lambda *_: None)
    for settings in ({}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
        ids_of = ids[:1] if "prompt_lookup_num_tokens" in settings else ids
        tokens = []
        for each in (model, plain):
            torch.manual_seed(0)
            tokens.append(each.generate(ids_of, max_new_tokens=20, **{"do_sample": False} | settings))
        assert torch.equal(*tokens), settings
    assert decoded


def test_other_defaults_of_torch_change_nothing(decoded):
    model, ids = small_model(), random_ids(2, 7)
    expected = two_steps(model, ids)
    torch.set_default_dtype(torch.float64)
    try:
        found = two_steps(model, ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert decoded
    for x, y in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert torch.equal(x, y)


def test_threads_share_the_rows_of_a_batch(monkeypatch):
    model, ids = small_model(), random_ids(5, 7)
    alone = two_steps(model, ids)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = two_steps(model, ids)
    for x, y in zip([alone[0], *alone[1]], [together[0], *together[1]], strict=True):
        assert_close(x, y)


def test_a_plain_step_passes_over_no_hook_mask_or_check(decoded):
    model, ids = small_model(), random_ids(2, 7)
    expected, calls, masked = two_steps(model, ids), [], torch.ones(2, 7, dtype=torch.long)
    handle = model.model.register_forward_hook(lambda module, arguments, output: calls.append(1))
    assert_close(two_steps(model, ids)[0], expected[0])  # the norm and the head by their modules
    assert len(calls) == 3
    handle.remove()
    masked[0, 6] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part, mask in ((slice(6), masked[:, :6]), (slice(6, 7), masked)):
            found = model(ids[:, part], attention_mask=mask, past_key_values=cache, use_cache=True).logits
        assert_close(cache.layers[0].keys[1], expected[1][0][1])  # the row that has read the last token
        assert not torch.allclose(cache.layers[0].keys[0], expected[1][0][0])
        assert found.shape == (2, 1, model.config.vocab_size)
        for wrong in (
            {"attention_mask": masked[:1]},
            {"past_key_values": DynamicCache()},
            {"input_ids": ids[:, :1] + model.config.vocab_size},
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 1, 13)},
        ):
            message = "attention_mask must be|was not made for this model|is not in the vocabulary|holds a window"
            with pytest.raises(ValueError, match=message):
                model(**{"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True} | wrong)
