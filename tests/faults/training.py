"""Faults of the network, the objective and the loop, each table with tests of its own (tests/plant.py)."""

# What is wrong: file, its text, what stands there instead.
LOOP = {
    "step k trains the expert of k + 1": (
        "train/loop.py", "expert = self.objective.expert(step)\n", "expert = self.objective.expert(step + 1)\n",
    ),
    "LR one step late": (
        "train/loop.py", "lr_factor(config.optim, step, config.steps)",
        "lr_factor(config.optim, max(0, step - 1), config.steps)",
    ),
    "validation with the Bridge off": (
        "train/objective/validate.py", "Draws(t, t, noises[0], noises[1], keep, keep, keep)",
        "Draws(t, t, noises[0], noises[1], keep, keep, 0 * keep)",
    ),
    "validation weights swapped": (
        "train/objective/validate.py", 'weights = {"video": config.video_weight, "audio": config.audio_weight}',
        'weights = {"video": config.audio_weight, "audio": config.video_weight}',
    ),
    "raw and averaged weights swapped in validation": (
        "train/objective/validate.py", 'losses | {f"ema/{name}": loss for name, loss in averaged.items()}',
        'averaged | {f"ema/{name}": loss for name, loss in losses.items()}',
    ),
    "fps not passed": ("train/objective/objective.py", "fps=bucket.fps", "fps=24.0"),
    "noise of sound from the picture's stream": (
        "train/objective/noise.py", '_normal(seed, "noise_audio"', '_normal(seed, "noise_video"',
    ),
    "noise of held-out sound from the picture's stream": (
        "train/objective/validate.py", 'f"validation/{purpose}", row', '"validation/video", row',
    ),
    "timesteps of another expert": (
        "train/objective/noise.py", "objective.expert(batch.step)", "objective.expert(batch.step + 1)",
    ),
    "Bridge on where it was dropped": (
        "train/objective/objective.py", "draws.keep_bridge * (seen & heard)", "1.0 * (seen & heard)",
    ),
    "loss divided by all slots": (
        "train/objective/objective.py", ".sum() / batch.total_weight", ".sum() / (batch.total_weight + 1)",
    ),
    "no clipping": ("train/engine/optim.py", "(norm + 1e-6)).clamp(max=1.0)", "(norm + 1e-6)).clamp(min=1.0, max=1.0)"),
    "eps of its own": ("train/optimizer/adamw.py", "eps=settings.eps,", "eps=1e-8,"),
    "averages that never warm up": ("train/engine/ema.py", "(1 + count) / (10 + count)", "(1 + count) / (1 + count)"),
    "both towers at the Bridge's rate": (
        "train/engine/optim_config.py", "else config.lr_tower", "else config.lr_bridge",
    ),
}  # fmt: skip
STOP = {
    "a validation that was cut off is not made up": (
        "train/loop.py", "lambda: was_validated(run_dir, self.state.step)", "lambda: self.state.step > 0",
    ),
    "each rank obeys its own request within a validation": (
        "train/objective/validate.py", "dist.all_reduce(going_on, dist.ReduceOp.MIN)", "pass",
    ),
    "a run that is stopped in its last validation has finished": (
        "train/loop.py", "state.step == config.steps and not self._owed", "state.step == config.steps",
    ),
    "a validation is a part of the step that follows": (
        "train/loop.py", 'self._lead.took("step", now - begin)', 'self._lead.took("step", now - self._begin)',
    ),
    "the lead knows nothing of a validation's clips": (
        "train/loop.py", 'self._lead.took("clip", asked - before)', "pass",
    ),
}  # fmt: skip
PARITY = {
    "RoPE of the Bridge off": ("model/joint.py", "if bridged and bridge.config.cross_rope:", "if False:"),
    "fps of 24 in the Bridge": (
        "model/rope.py", "(audio_fps / fps) * _frequencies", "(audio_fps / 24.0) * _frequencies",
    ),
    "50 latent steps of sound a second": (
        "model/rope.py", "(audio_fps / fps) * _frequencies", "(50.0 / fps) * _frequencies",
    ),
    "gates of the block swapped": (
        "model/block.py", "shift_a, scale_a, gate_a, shift_m, scale_m, gate_m =",
        "shift_a, scale_a, gate_m, shift_m, scale_m, gate_a =",
    ),
    "eps of the Bridge's norms": ("model/bridge.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-4"),
}  # fmt: skip
SAMPLER = {
    "the sampler's boundary is 900": ("train/generate.py", 'name: trained[name] for name', 'name: 900.0 for name'),
    "a formula of the shift that is off": (
        "model/shift.py", "return shift * u / (1 + (shift - 1) * u)", "return shift * u / (1 + shift * u)",
    ),
}  # fmt: skip
MODEL = {
    "tokens of several frames counted as one": ("model/rope.py", "patches[0] * torch.arange", "torch.arange"),
    "tokens of several steps of sound counted as one": ("model/rope.py", "patches[1] * torch.arange", "torch.arange"),
    "residual writers as large as the rest": ("model/init.py", "STD / math.sqrt(2 * depth)", "STD"),
    "the Bridge's writer as large as the rest": ("model/init.py", ', ".inner.o.weight")', ")"),
    "RoPE's factors rounded to bfloat16": (
        "model/rope.py", "turn_pairs(x, self.cos, self.sin,",
        "turn_pairs(x, self.cos.to(x.dtype).float(), self.sin.to(x.dtype).float(),",
    ),
    "RoPE's tables in bfloat16": (
        "model/rope.py", "f(angles).to(torch.float32)", "f(angles).to(torch.bfloat16).float()",
    ),
}  # fmt: skip
FUSED = {
    "a turn's gradient turns on": ("model/fused.py", "-sin if back else sin", "sin"),
    "channels that do not turn are lost": ("model/fused.py", "out[..., turned:] = x[..., turned:]", "out.zero_()"),
    "an RMSNorm without eps": ("model/fused.py", ".add_(eps).rsqrt_()", ".rsqrt_()"),
    "the gradient of an RMSNorm without that of its mean": (
        "model/fused.py", ".addcmul_(z, along[:, None], value=-1)", "",
    ),
    "a gate's gradient without a token": (
        "model/fused.py", "(gradient * y).sum_to_size", "(gradient * y)[:, 1:].sum_to_size",
    ),
    "sums of a modulation in bfloat16": ("model/fused.py", "return x.is_cuda or x.dtype.itemsize >= 4", "return True"),
    "a modulation keeps what lies between": (
        "model/fused.py", "if ctx.of_one:\n            return out.to",
        "ctx.between = out\n        if ctx.of_one:\n            return out.to",
    ),
}  # fmt: skip
OBJECTIVE = {
    "pairs take the audio's own place": (
        "train/objective/objective.py", "torch.where(paired, position, u_audio)", "u_audio",
    ),
    "pairs take the video's noise level": (
        "train/objective/objective.py", "position = unshift_sigma(t_video.double() / 1000, config.shift_video)",
        "position = t_video.double() / 1000",
    ),
    "cosine from step 0": (
        "train/engine/schedule.py", "(step - config.warmup) / max(1, steps - config.warmup)", "step / max(1, steps)",
    ),
    "wsd that ends one step late": (
        "train/engine/schedule.py", "(step + 1 - (steps - config.decay_steps))",
        "(step - (steps - config.decay_steps))",
    ),
    "a visit's moments do not come back": (
        "train/engine/optim.py", "state[shard][key] = buffer.copy_(state[shard][key], non_blocking=True)",
        "state[shard][key] = buffer",
    ),
    "eps inside of the root": ("train/optimizer/adamw.py", "eps=settings.eps,", "eps=settings.eps**0.5,"),
}  # fmt: skip
GUARD = {
    "one limit for both experts": ("train/faults/bad_steps.py", "if entry[1] == kind and self", "if self"),
    "a warm-up's norms set the limit": ("train/faults/bad_steps.py", "self._warmup <= entry[0]", "entry[0]"),
}
