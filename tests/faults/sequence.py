"""Faults of shared tokens (tests/plant.py)."""

_TRAFFIC = ["tests/train/parallel/test_traffic.py", "-k", "its_formula_says"]
# What is wrong: file, its text, what stands there instead; the tests that fail.
SHARED_TOKENS = {
    "what Ulysses exchanged is sent again": (
        "train/parallel/recompute.py", '"selective": [*ATTENTIONS, *EXCHANGES]',
        '"selective": ATTENTIONS', _TRAFFIC,
    ),
    "a ring is computed and sent again": ("train/parallel/recompute.py", "    RING,\n", "", _TRAFFIC),
    "a merge is computed and sent again": ("train/parallel/recompute.py", "    MERGE,\n", "", _TRAFFIC),
    "counters do not look into operators": (
        "train/monitor/counters.py", "        if func in BODIES:\n", "        if False:\n", _TRAFFIC,
    ),
    "a ring sums its parts in bfloat16": (
        "train/parallel/sequence/ring.py", "return torch.promote_types(dtype, torch.float32)", "return dtype",
        ["tests/train/parallel/sequence/test_ring.py"],
    ),
    "q leaves with k": (
        "model/attention.py",
        "        q = self.core.start(q, after=v)\n"
        "        k = self.norm_k(self.k(y)).unflatten(-1, (self.num_heads, -1))  # [B, Lk, H, D]\n",
        "        k = self.norm_k(self.k(y)).unflatten(-1, (self.num_heads, -1))  # [B, Lk, H, D]\n"
        "        q = self.core.start(q, after=v)\n",
        ["tests/train/parallel/sequence/test_ulysses.py"],
    ),
    "gradients that nobody needs travel for ever": (
        "train/parallel/sequence/ulysses.py", "_ticket(one) if needed else one.finish()[0].new_empty(1)",
        "_ticket(one)",
        ["tests/train/parallel/sequence/test_ulysses.py"],
    ),
    "a compiled block writes over what is being sent": (
        "train/parallel/sequence/ulysses.py", "if copied and sent.untyped", "if False and sent.untyped",
        ["tests/train/parallel/sequence/test_ulysses.py"],
    ),
    "a compiled block forgets what it sends": (
        "train/parallel/sequence/ulysses.py", "[x.detach()] if torch.compiler.is_compiling() else []", "[]",
        ["tests/train/parallel/sequence/test_ulysses.py"],
    ),
    "answers' gradients leave before answers that are computed again": (
        "train/parallel/sequence/ulysses.py", "HEADS_FOR_TOKENS(grad, *ctx.saved_tensors, *ctx.where)",
        "HEADS_FOR_TOKENS(grad, grad, *ctx.where)", ["tests/train/parallel/sequence/test_ulysses.py"],
    ),
    "what Ulysses sends is waited for": (
        "train/plan/kernels.py", "self.meanwhile[op] += travelling()", "pass", ["tests/train/plan/test_count.py"],
    ),
    "the feed-forward's second product is computed again": (
        "train/parallel/recompute.py", "kept = inputs[place].shape[1] > inputs[place + 1].shape[1]", "pass",
        ["tests/train/plan/test_count.py"],
    ),
    "heads of a compiled block that come back in another order": (
        "train/parallel/sequence/ulysses.py", "received.view(len(shapes), *shapes[0])",
        "received.view(len(shapes), *shapes[0]).flip(0)",
        ["tests/train/parallel/sequence/test_compiled.py", "-k", "12 and heads"],
    ),
}  # fmt: skip
