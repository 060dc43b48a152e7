"""Where mixed precision pays on a CPU, and which products in float32 are the faster ones."""

import time

import torch

NO_BF16 = "this CPU has neither AVX-512 BF16 nor AMX"
SLOW_BF16 = f"{NO_BF16}, and bfloat16 would be slower: float32 is used"
SLOW_MUON = f"{NO_BF16}, and an update in bfloat16, the only one of torch.optim.Muon, takes 5 times as long or more"


def emulates_bf16() -> bool:
    """Whether the CPU takes products in bfloat16 apart, which is 11 to 14 times slower than float32."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


WORTH_A_TRIAL = 1 << 17  # tokens of a run: in less time than a smaller one takes the trial would not be made up for
EXACT = 1e-6
FASTER = 1.5  # less, by 1.05 to 1.3 on a Zen 4, other work on the machine tips: a run is to compute the same again


def faster_products() -> str | None:
    """A line that says so where float32 products are faster at precision "medium", and as exact as at "highest".

    At "medium" torch asks oneDNN in place of MKL. What this then does is up to the processor: with AVX-512 it may
    compute in float32 at more than twice MKL's rate, with AMX it computes in bfloat16, and with AVX2 torch goes on
    with MKL. So that it is tried, with two factors of 512 x 512 against float64.
    """
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(512, 512, generator=generator) for _ in range(2)]
    exact = torch.matmul(*(factor.double() for factor in factors))
    before = torch.get_float32_matmul_precision()
    seconds: dict[str, list[float]] = {"highest": [], "medium": []}
    try:
        for _ in range(7):
            for precision, times in seconds.items():
                torch.set_float32_matmul_precision(precision)
                start = time.process_time()
                product = torch.matmul(*factors)
                times.append(time.process_time() - start)
    finally:
        torch.set_float32_matmul_precision(before)
    error = float((product - exact).norm() / exact.norm())
    gain = min(seconds["highest"]) / min(seconds["medium"])
    if error < EXACT and gain > FASTER:
        return f"float32 products by oneDNN: {gain:.1f} times as fast as by MKL, error {error:.0e} against float64"
    return None
