"""Where mixed precision pays on a CPU."""

import torch

NO_BF16 = "this CPU has neither AVX-512 BF16 nor AMX"
SLOW_BF16 = f"{NO_BF16}, and bfloat16 would be slower: float32 is used"
SLOW_MUON = f"{NO_BF16}, and an update in bfloat16, the only one of torch.optim.Muon, takes 5 times as long or more"


def emulates_bf16() -> bool:
    """Whether the CPU takes products in bfloat16 apart, which is 11 to 14 times slower than float32."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
