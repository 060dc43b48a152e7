"""transformers' own Mamba under the mixins of test_conformance.py, for docs/upstream.md; no test run collects this:

pytest tests/conformance/mamba.py
"""

import unittest

from test_conformance import Conformance, ModelTester
from transformers import MambaConfig, MambaForCausalLM, MambaModel


class MambaTester(ModelTester):
    base_model_class, causal_lm_class = MambaModel, MambaForCausalLM

    def get_config(self) -> MambaConfig:
        sizes = {"hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers, "state_size": 16}
        return MambaConfig(vocab_size=self.vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)


class TestMamba(Conformance, unittest.TestCase):
    all_model_classes = (MambaModel, MambaForCausalLM)

    @property
    def model_tester(self):
        return MambaTester("mamba")
