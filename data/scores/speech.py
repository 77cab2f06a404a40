"""Scores of speech: how much of it there is (silero-vad), and how clean it is (DNSMOS)."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from data.decode import SAMPLE_RATE
from data.errors import DataError
from data.scores import Decoded
from data.scores.sound import silence_ratio
from data.window import find_speech

DNSMOS_SAMPLES = round(9.01 * SAMPLE_RATE)  # what the network takes


class SpeechFraction:
    """`speech_fraction`: share of the window that silero-vad calls speech."""

    name, version, columns = "speech", 1, ("speech_fraction",)

    def __call__(self, decoded: Decoded) -> dict[str, float]:
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
    columns = ("dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak")

    def __init__(self, max_silence: float, silence_db: float):
        self.max_silence, self.silence_db = max_silence, silence_db

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        waveform = decoded.waveform
        if waveform is None or not silence_ratio(waveform, self.silence_db) <= self.max_silence:
            return dict.fromkeys(self.columns, math.nan)
        samples = np.resize(waveform.clamp(-1, 1).numpy(), DNSMOS_SAMPLES)
        found = dnsmos_model()(samples, SAMPLE_RATE, False)
        return {column: float(found[f"{column.removeprefix('dnsmos_')}_mos"]) for column in self.columns}


@lru_cache(maxsize=1)
def dnsmos_model() -> Any:
    """The network of the speechmos package, once a process, on one thread."""
    try:
        import onnxruntime
        from speechmos import dnsmos
    except ImportError as error:
        raise DataError(
            "the score dnsmos needs speechmos, librosa and onnxruntime: pip install speechmos librosa onnxruntime"
        ) from error
    from pathlib import Path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a worker is one thread
    folder = Path(dnsmos.__file__).parent / "dnsmos_models"
    model = dnsmos.DNSMOS.__new__(dnsmos.DNSMOS)  # its constructor would take all cores
    for attribute, file in (("onnx_sess", "sig_bak_ovr.onnx"), ("p808_onnx_sess", "model_v8.onnx")):
        providers = ["CPUExecutionProvider"]
        setattr(model, attribute, onnxruntime.InferenceSession(str(folder / file), options, providers=providers))
    return model
