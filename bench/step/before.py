"""What was found before, for bench/step/roofline.py: by another study, and by the same program at an earlier commit.

The study counted operations by source line with anomaly mode and timed them by a model of its own, on 2026-11-28, for
commit 21ad654. No GPU was used there either.
"""

STUDY = (
    "a study of 2026-11-28 at commit 21ad654, with another counter and another time model, predicted too; it timed "
    "selective and counted with nothing computed again"
)
RATES = {  # low, middle, high, or the middle alone; launch_us: its range
    "gemm_tflops": (620, 680, 740),
    "float8_gemm_tflops": (900,),
    "attention_tflops": (580, 620, 660),
    "attention_backward_tflops": (500, 550, 590),
    "memory_gb_s": (2850,),
    "node_gb_s": (330,),
    "network_gb_s": (340,),
    "launch_us": (3.5, 6.0),
}
AIMS = {"360p, 64 GPUs, Ulysses 8": 0.48, "720p, 64 GPUs, Ulysses 8": 0.485}  # MFU in bfloat16 at the middle rates
BEFORE = {
    "360p, 16 GPUs, Ulysses 8": "3,135, 33.4% (with a network of 180 GB/s a node, not 340)",
    "360p, 64 GPUs, Ulysses 8": "2,867, 36.6% (low 3,049, 34.4%; high 2,727, 38.4%)",
    "360p, 1,024 GPUs, Ulysses 8, 16 copies": "2,867, 36.6% (as 64)",
    "720p, 64 GPUs, Ulysses 8": "25,497, 45.4%",
    "720p, 64 GPUs, ring 2 x Ulysses 8": "13,246, 43.7% (compiled, and with FA3's rate in the ring's backward)",
}
BEFORE_BYTES = {  # launches, GB and ms of forward and backward
    "attention": "800, 56, 1,213.2",
    "products": "2,856, 280, 711.9",
    "RoPE": "5,259, 342, 120.2",
    "FSDP2 copies": "1,028, 278, 97.5",
    "copies around exchanges and merges": "1,780, 129, 45.3",
    "LayerNorm with modulation": "1,418, 86, 30.3",
    "gate and residual": "840, 58, 20.3",
    "RMSNorm of q and k": "1,200, 47, 16.3",
    "GELU": "144, 31, 10.9",
    "LayerNorm with weights": "520, 20, 6.9",
    "bias gradients": "818, 19, 6.6",
    "other elementwise work": "1,795, 56, 19.8",
    "optimizer": "205, 46, 16.1 (of 16 ranks)",
    "sum": "18,663, 1,447, 2,315",
}
EARLIER = "97d811b"  # before RoPE, norms and modulation went over memory in few passes
EARLIER_STEPS = {  # this program, that commit: predicted ms and MFU, middle
    ("360p, 16 GPUs, Ulysses 8", "selective"): "2,868, 36.6%",
    ("360p, 16 GPUs, Ulysses 8", "budget"): "2,693, 38.9% (budget 45.3 GiB)",
    ("360p, 64 GPUs, Ulysses 8", "selective"): "2,873, 36.5%",
    ("360p, 64 GPUs, Ulysses 8", "budget"): "2,563, 40.9% (budget 74.5 GiB)",
    ("360p, 1,024 GPUs, Ulysses 8, 16 copies", "selective"): "2,905, 36.1%",
    ("360p, 1,024 GPUs, Ulysses 8, 16 copies", "budget"): "2,595, 40.4% (budget 74.5 GiB)",
    ("720p, 64 GPUs, Ulysses 8", "selective"): "25,331, 45.8%",
    ("720p, 64 GPUs, Ulysses 8", "budget"): "25,199, 46.0% (budget 63.7 GiB)",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "selective"): "13,891, 41.7%",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "budget"): "13,639, 42.5% (budget 67.2 GiB)",
}
UNITS = "e05cb46"  # the last one with a unit for each Bridge direction and each audio block, fetched one ahead
WAITS = {  # this program, that commit: predicted ms of waiting for weights and for reductions
    ("360p, 64 GPUs, Ulysses 8", "selective"): "105.5, 104.3",
    ("360p, 64 GPUs, Ulysses 8", "none"): "105.5, 124.3",
    ("720p, 64 GPUs, Ulysses 8", "budget"): "70.9, 21.8",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "budget"): "92.2, 69.5",
}
EARLIER_MEMORY = {  # this program, that commit: counted peak, GiB; predicted ms a clip, MFU
    ("360p, 64 GPUs, Ulysses 8", "none"): "74.7 (2,534, 41.4%)",
    ("360p, 64 GPUs, Ulysses 8", "selective"): "22.4 (2,868, 36.6%)",
    ("360p, 64 GPUs, Ulysses 8", "budget"): "66.1 (budget 72.9 GiB; 2,562, 40.9%)",
    ("360p, 64 GPUs, Ulysses 8", "full"): "16.8 (3,181, 33.0%)",
    ("720p, 64 GPUs, Ulysses 8", "none"): "265.1 (23,946, 48.4%)",
    ("720p, 64 GPUs, Ulysses 8", "selective"): "55.4 (25,325, 45.8%)",
    ("720p, 64 GPUs, Ulysses 8", "budget"): "70.3 (budget 62.2 GiB; 25,198, 46.0%)",
    ("720p, 64 GPUs, Ulysses 8", "full"): "32.6 (30,491, 38.0%)",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "none"): "139.3 (13,166, 44.0%)",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "selective"): "38.0 (13,885, 41.7%)",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "budget"): "69.5 (budget 65.7 GiB; 13,640, 42.5%)",
    ("720p, 64 GPUs, ring 2 x Ulysses 8", "full"): "22.6 (16,467, 35.2%)",
}
