"""minGRU, minLSTM (arXiv 2410.01201) and kin for transformers. Importing it registers them with the Auto classes."""

import transformers

from .chunked_backward import sequence_chunked_backward
from .configuration_minrnn import MinRNNConfig
from .layer import MinGRU, MinLSTM, MinRNN
from .modeling_minrnn import (
    AUTO_MAP,
    NO_LOGITS,
    MinRNNForCausalLM,
    MinRNNForMaskedLM,
    MinRNNForMultipleChoice,
    MinRNNForQuestionAnswering,
    MinRNNForSequenceClassification,
    MinRNNForTokenClassification,
    MinRNNModel,
    MinRNNPreTrainedModel,
)
from .scan import linear_scan, minrnn_scan
from .state_file import load_state, save_state

__version__ = "0.1.0"

transformers.AutoConfig.register("minrnn", MinRNNConfig)
for auto_class, path in AUTO_MAP.items():
    if auto_class != "AutoConfig":
        getattr(transformers, auto_class).register(MinRNNConfig, globals()[path.split(".")[1]])

__all__ = [
    "NO_LOGITS",
    "MinGRU",
    "MinLSTM",
    "MinRNN",
    "MinRNNConfig",
    "MinRNNForCausalLM",
    "MinRNNForMaskedLM",
    "MinRNNForMultipleChoice",
    "MinRNNForQuestionAnswering",
    "MinRNNForSequenceClassification",
    "MinRNNForTokenClassification",
    "MinRNNModel",
    "MinRNNPreTrainedModel",
    "linear_scan",
    "load_state",
    "minrnn_scan",
    "save_state",
    "sequence_chunked_backward",
]
