"""Both cells under the test mixins that transformers runs on every model of its own.

The mixins come from the source distribution of transformers, see transformers_tests/. Two are not mounted, because the
archive leaves out the tests that they run: PipelineTesterMixin and GenerationTesterMixin. FSDPTesterMixin takes longer
than all the rest, its processes waiting for each other: `make test` leaves it to `make conformance`.
"""

import os
import unittest

import pytest
import torch
import transformers

import modeling_minrnn
from modeling_minrnn import MinRNNConfig
from modeling_minrnn.modeling_minrnn import AUTO_MAP

if transformers.__version__ != "5.23.0":  # that of archive.txt
    pytest.skip("the mixins here are those of transformers 5.23.0", allow_module_level=True)
try:
    from transformers_tests import (
        test_fsdp_mixin,
        test_modeling_common,
        test_tensor_parallel_mixin,
        test_training_mixin,
    )
except OSError as error:
    if os.environ.get("CI"):
        raise
    pytest.skip(str(error), allow_module_level=True)

MODEL_CLASSES = {
    auto_class: getattr(modeling_minrnn, path.split(".")[1])
    for auto_class, path in AUTO_MAP.items()
    if auto_class != "AutoConfig"
}
# The mixins know the task of a model by the library's own lists of names,
for auto_class, model_class in MODEL_CLASSES.items():
    getattr(transformers, auto_class)._model_mapping._model_mapping["minrnn"] = model_class.__name__
# test in several processes only the models on another list,
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
# and would have a core for each.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 4


class ModelTester:
    """The tiny models and inputs that the mixins ask for."""

    base_model_class = MODEL_CLASSES["AutoModel"]
    causal_lm_class = MODEL_CLASSES["AutoModelForCausalLM"]
    is_training = True
    batch_size = 3
    seq_length = 7
    num_choices = 2
    hidden_size = 32
    num_hidden_layers = 2
    vocab_size = 99

    def __init__(self, cell_type: str):
        self.cell_type = cell_type

    def get_config(self) -> MinRNNConfig:
        return MinRNNConfig(
            cell_type=self.cell_type,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            vocab_size=self.vocab_size,
            expansion_factor=1.5,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class Conformance(
    test_modeling_common.ModelTesterMixin,
    test_training_mixin.TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    cell_type: str
    all_model_classes = tuple(MODEL_CLASSES.values())
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # it looks for the year in a copyright line

    @property
    def model_tester(self):
        return ModelTester(self.cell_type)

    @pytest.mark.skip("GenerationTesterMixin is not in the archive")
    def test_generation_tester_mixin_inheritance(self):
        """Replaces the mixin's."""


class TestMinGRU(Conformance, unittest.TestCase):
    cell_type = "mingru"


class TestMinLSTM(Conformance, unittest.TestCase):
    cell_type = "minlstm"
