"""Faults of weights from folders and into them, and of encoders, each with its own tests (tests/plant.py)."""

# What is wrong: file, its text, what stands there instead, and the tests that must see it.
START, EXPORT = "tests/train/test_init_source.py", "tests/tools/test_export.py"
WEIGHTS = {
    "the expert for high noise is Wan's for low": (
        "model/weights/parts.py", '"high_noise_model": "Wan"', '"low_noise_model": "Wan"',
        ["tests/model/test_weights.py", "-k", "experts_of_wan"],
    ),
    "diffusers' norm3 for its norm2": (
        "model/weights/names.py", '"norm3": "norm2"', '"norm3": "norm3"',
        ["tests/model/test_weights.py", "-k", "experts_of_wan or names_of"],
    ),
    "a widened stem one channel off": (
        "model/weights/parts.py", "padded[:, :narrow] = rows",
        "step = narrow // 16\n        padded[:, step : narrow + step] = rows",
        ["tests/model/test_weights.py", "-k", "widened"],
    ),
    "averages do not begin from the weights that were read": (
        "train/engine/engine.py", "(self.network, part)\n        if self.optimizer.average is not None:",
        "(self.network, part)\n        if False:",
        [START, "-k", "slice_by_slice"],
    ),
    "a part without a source is drawn unasked": (
        "train/start/sources.py", '        elif part != "video_low":  # a model may have one expert',
        '        elif part != "video_low":\n            made[part] = FRESH\n        elif part == "nothing":',
        [START, "-k", "refused_before"],
    ),
    "an export's boundary is the paper's": (
        "tools/export/folder.py", 'facts["boundary"] / 1000', "0.9", [EXPORT, "-k", "base_folder"],
    ),
    "frozen parts are exported by averages that are not theirs": (
        "tools/export/tensors.py", "and module in averages and average in stored", "and average in stored",
        [EXPORT, "-k", "frozen"],
    ),
    "a Bridge of zeros that is not": (
        "model/init.py", 'if zero and ".inner.o." in name:', 'if zero and ".inner.o.bias" in name:',
        [START, "-k", "bridge_of_zeros"],
    ),
    "an index may name files elsewhere": (
        "model/weights/files.py", "if Path(name).name != name):", "if False):",
        ["tests/model/test_weights.py", "-k", "hostile"],
    ),
}  # fmt: skip
_MOVA, _VIDEO = "tests/data/codec/test_mova.py", "data/codec/mova/video.py"
_SCALED = "parts.append((mode.float().cpu() - mean) / deviation)"
_STATED = "self.config, self.precision, self.batch, state"
ENCODERS = {
    "latents of the VAE as they are": (_VIDEO, _SCALED, "parts.append(mode.float().cpu())", [_MOVA, "-k", "pictures"]),
    "latents normalised in bfloat16": (
        _VIDEO, _SCALED, "parts.append(((mode.cpu() - mean).bfloat16() / deviation.bfloat16()).float())",
        [_MOVA, "-k", "pictures"],
    ),
    "a sample of the posterior": (_VIDEO, "latent_dist.mode()", "latent_dist.sample()", [_MOVA, "-k", "pictures"]),
    "the condition is the first frame's encoding alone": (
        "data/codec/__init__.py", "min(frames, 1 + FRAMES * self.memory)", "1", [_MOVA, "-k", "condition"],
    ),
    "a condition one latent short": (_VIDEO, "memory = 29", "memory = 28", [_MOVA, "-k", "condition"]),
    "sound is not filled to whole latents": (
        "data/codec/mova/dac.py", "-waveforms.shape[-1] % self.config.hop", "0", [_MOVA, "-k", "sound"],
    ),
    "weight norm is not multiplied out": (
        "data/codec/mova/dac.py", "torch._weight_norm(v.float(), g.float(), 0)", "v.float()", [_MOVA, "-k", "sound"],
    ),
    "padded rows of text are stored": (
        "data/codec/mova/text.py", "rows[: int(tokens.attention_mask.sum())]", "rows", [_MOVA, "-k", "words"],
    ),
    "a fingerprint without the precision": (
        _VIDEO, _STATED, "self.config, self.batch, state", [_MOVA, "-k", "precision"],
    ),
    "a fingerprint without the batch": (
        _VIDEO, _STATED, "self.config, self.precision, state", [_MOVA, "-k", "precision"],
    ),
    "captions are not repaired": (
        "data/codec/mova/text.py", "ftfy.fix_text(caption)", "caption", [_MOVA, "-k", "cleaned"],
    ),
    "the encoder hears speech's sound": (
        "data/prepare/stages.py", "decoded.sound_at(rate)", "decoded.waveform",
        ["tests/data/codec/test_preparing.py", "-k", "window_stores and alone"],
    ),
    "other encoders start a run": (
        "train/encoders.py", "if not ignore:", "if False:", ["tests/train/test_encoders.py"],
    ),
    "other encoders decode": (
        "data/codec/__init__.py", "if codec.kind not in stated or", "if True or",
        ["tests/tools/test_encoders.py", "-k", "each_program"],
    ),
}  # fmt: skip
