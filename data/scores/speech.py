"""Scores of speech: how much of it there is (silero-vad), and how clean it is (DNSMOS)."""

import math
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.media import SAMPLE_RATE
from data.scores.decoded import DecodedWindow
from data.scores.sound import silence_ratio
from data.windows.window import find_speech, need

DNSMOS_SAMPLES = round(9.01 * SAMPLE_RATE)  # what the network takes
# polynomials from the network's outputs to opinion scores, highest power first (speechmos, MIT licence)
POLYNOMIALS = {
    "dnsmos_sig": (-0.08397278, 1.22083953, 0.0052439),
    "dnsmos_bak": (-0.13166888, 1.60915514, -0.39604546),
    "dnsmos_ovrl": (-0.06766283, 1.11546468, 0.04602535),
}


class SpeechFraction:
    """`speech_fraction`: share of the window that silero-vad calls speech."""

    name, version, columns = "speech", 1, ("speech_fraction",)

    def __init__(self) -> None:
        need("the score speech", "silero_vad", "onnxruntime")

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        if decoded.waveform is None:
            return {"speech_fraction": math.nan}
        spoken = sum(end - start for start, end in find_speech(decoded.waveform))
        return {"speech_fraction": min(1.0, spoken * SAMPLE_RATE / len(decoded.waveform))}


class Dnsmos:
    """`dnsmos_ovrl`, `dnsmos_sig`, `dnsmos_bak`: mean opinion scores of speech, 1 to 5 (Reddy et al., DNSMOS P.835).

    The window is repeated up to the network's 9.01 s; of a longer one the first 9.01 s count. Not measured (NaN) above
    `max_silence`: the network gives silence a middling score. It says nothing about sounds that are not speech.
    """

    name, version = "dnsmos", 1
    columns = tuple(POLYNOMIALS)

    def __init__(self, max_silence: float, silence_db: float):
        need("the score dnsmos", "speechmos", "onnxruntime")
        self.max_silence, self.silence_db = max_silence, silence_db

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        waveform = decoded.waveform
        if waveform is None or not silence_ratio(waveform, self.silence_db) <= self.max_silence:
            return dict.fromkeys(self.columns, math.nan)
        samples = np.resize(waveform.clamp(-1, 1).numpy(), DNSMOS_SAMPLES).astype(np.float32)
        raw = dnsmos_model().run(None, {"input_1": samples[None]})[0][0]  # signal, background, overall
        return {name: float(np.polyval(POLYNOMIALS[name], value)) for name, value in zip(POLYNOMIALS, raw, strict=True)}


@lru_cache(maxsize=1)
def dnsmos_model() -> Any:
    """The network that the package speechmos carries, once a process, on one thread; the package's code isn't run."""
    import onnxruntime

    spec = find_spec("speechmos")
    assert spec is not None and spec.submodule_search_locations, "Dnsmos has looked for it"
    path = Path(spec.submodule_search_locations[0]) / "dnsmos_models" / "sig_bak_ovr.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a worker is one thread
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
