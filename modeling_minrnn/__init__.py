"""minGRU, minLSTM (arXiv 2410.01201) and kin for transformers. Importing it registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .chunked_backward import sequence_chunked_backward
from .configuration_minrnn import MinRNNConfig
from .layer import MinGRU, MinLSTM, MinRNN
from .modeling_minrnn import (
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

AutoConfig.register("minrnn", MinRNNConfig)
AutoModel.register(MinRNNConfig, MinRNNModel)
AutoModelForCausalLM.register(MinRNNConfig, MinRNNForCausalLM)
AutoModelForMaskedLM.register(MinRNNConfig, MinRNNForMaskedLM)
AutoModelForMultipleChoice.register(MinRNNConfig, MinRNNForMultipleChoice)
AutoModelForQuestionAnswering.register(MinRNNConfig, MinRNNForQuestionAnswering)
AutoModelForSequenceClassification.register(MinRNNConfig, MinRNNForSequenceClassification)
AutoModelForTokenClassification.register(MinRNNConfig, MinRNNForTokenClassification)

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
