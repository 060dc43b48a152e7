"""Where mixed precision pays on a CPU."""

import torch

SLOW_BF16 = "this CPU has neither AVX-512 BF16 nor AMX, and bfloat16 would be slower: float32 is used"


def emulates_bf16() -> bool:
    """Whether the CPU takes products in bfloat16 apart, which is 11 to 14 times slower than float32."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
