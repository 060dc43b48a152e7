"""The model under PEFT: LoRA adapters found, trained, merged, saved and loaded."""

import subprocess
import sys

import pytest
import torch
from small_models import CELLS, assert_close, random_ids, small_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

peft = pytest.importorskip("peft")

# PEFT 0.21 knows gradient checkpointing by its older name, which all versions of transformers here understand.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")

TARGETS = {"default": None, "all-linear": "all-linear"}
PROJECTIONS = ("in_proj", "out_proj", "up_proj", "down_proj")


def adapted_model(cell_type="mingru", targets=None, seed=1, **fields):
    """A small model with adapters that change its output: PEFT starts them at zero."""
    config = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(small_model(cell_type, **fields), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("cell_type", CELLS)
def test_lora_adapts_every_linear_of_the_layers(cell_type, targets):
    model = adapted_model(cell_type, targets, tie_word_embeddings=False)
    adapted = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    linear = {name for name, module in small_model(cell_type).named_modules() if isinstance(module, nn.Linear)}
    assert adapted == {f"base_model.model.{name}" for name in linear - {"lm_head"}}
    assert {name.rpartition(".")[2] for name in adapted} == set(PROJECTIONS)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{matrix}.default.weight" for name in adapted for matrix in "AB"}


IN_A_FRESH_PROCESS = """
import sys
from transformers import AutoModelForCausalLM

if sys.argv[2] == "package":
    import modeling_minrnn
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "hub")
assert "peft" not in sys.modules
assert ("modeling_minrnn" in sys.modules) == (sys.argv[2] == "package")

from peft import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig())
adapted = [name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
print(sorted({name.rpartition(".")[2] for name in adapted}))
"""


@pytest.mark.parametrize("code", ["package", "hub"])
def test_the_default_targets_are_known_to_a_peft_imported_after_the_model(code, tmp_path, pytestconfig, monkeypatch):
    small_model().save_pretrained(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    command = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS, tmp_path, code]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout.strip() == str(sorted(PROJECTIONS)), process.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cell_type", CELLS)
def test_a_merged_model_is_a_plain_one_with_the_same_logits(cell_type, dtype, tmp_path):
    model = adapted_model(cell_type, dtype=dtype)
    ids = random_ids(2, 63)
    adapted, base = model(ids).logits, small_model(cell_type, dtype=dtype)
    assert not torch.allclose(adapted, base(ids).logits, rtol=0.1)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert_close(merged(ids).logits, adapted)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in merged.state_dict().items())


def test_generation_with_adapters_is_that_of_the_merged_model():
    model = adapted_model()
    prompt = random_ids(3, 9)
    generated = model.generate(input_ids=prompt, max_new_tokens=30, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(generated, merged.generate(prompt, max_new_tokens=30, do_sample=False))
    assert not torch.equal(generated, small_model().generate(prompt, max_new_tokens=30, do_sample=False))


def test_saved_adapters_give_the_same_logits_on_the_saved_model(tmp_path):
    small_model().save_pretrained(tmp_path / "base")
    model, ids = adapted_model(), random_ids(2, 33)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters").eval()
    assert torch.equal(by_transformers(ids).logits, model(ids).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_leaves_the_gradients_of_adapters_the_same(use_reentrant):
    ids = random_ids(2, 33)
    gradients = []
    for checkpointed in (False, True):
        model = adapted_model().train()
        if checkpointed:
            # Reentrant checkpoints pass a gradient on only where an input of theirs needs one.
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer_trains_the_adapters_alone(gradient_checkpointing, tmp_path):
    model = adapted_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dataset = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 17)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        learning_rate=0.02,
        logging_steps=1,
        gradient_checkpointing=gradient_checkpointing,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def prompt_tuned(config):
    return peft.get_peft_model(small_model(), config).eval()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # of PEFT, about those that generate passes
def test_a_tuned_prompt_is_read_before_the_text_and_its_gradient_is_that_of_the_embeddings():
    """PEFT asks a model for its attention heads, of which there are none, and has no use for them here."""
    model = prompt_tuned(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids, base = random_ids(2, 7), model.get_base_model()
    prompt = model.get_prompt_embedding_to_save("default").expand(2, -1, -1).clone().requires_grad_()
    embeds = torch.cat([prompt, base.get_input_embeddings()(ids)], 1)
    expected = base(inputs_embeds=embeds).logits
    found = model(input_ids=ids).logits
    assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert_close(model.prompt_encoder["default"].embedding.weight.grad, prompt.grad.sum(0))
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    again = base.generate(inputs_embeds=embeds.detach(), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated[:, 7:], again)


@pytest.mark.parametrize("heads", [None, 2])
def test_prefix_tuning_is_refused_and_state_tuning_named(heads):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=heads)
    with pytest.raises(ValueError, match="prefix tuning.* state tuning in docs/fine-tuning.md"):
        prompt_tuned(config)(input_ids=random_ids(2, 7))
