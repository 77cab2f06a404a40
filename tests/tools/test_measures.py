"""Numbers about a clip: what they are on clips whose content is known."""

import pytest
import torch

from data.errors import DataError
from data.sync.learned import NetworkConfig, SyncNetwork, pack_network
from tests.data.sync.test_impacts import clip
from tools.measures import Measures


def test_known_clips():
    pixels = torch.zeros(3, 9, 8, 8)
    pixels[:, 1::2] = 0.5  # a quarter of the range from frame to frame
    sound = 0.1 * torch.sin(torch.arange(16000) * 0.3)
    found = Measures()(pixels, sound, 24.0, 16000)
    assert found == {"loudness": pytest.approx(-23.01, abs=0.01), "motion": 0.25}
    assert Measures()(pixels[:, :1], torch.zeros(0), 24.0, 16000) == {"loudness": -120.0}


def test_impacts_are_those_of_the_clip_and_a_lone_side_counts_nothing():
    pixels, sound, truth = clip(0, "bounce")
    found = Measures(impacts=True)(pixels, sound, 24.0, 16000)
    assert found["impacts_seen"] == len(truth) > 0
    assert found["impacts_heard"] == len(truth)
    assert found["impacts_f1"] == 1.0
    silent = Measures(impacts=True)(pixels, torch.zeros_like(sound), 24.0, 16000)
    assert silent["impacts_heard"] == 0 and silent["impacts_f1"] == 0.0


def test_a_learned_scorer_adds_its_scores_and_a_wrong_file_is_refused(tmp_path):
    (tmp_path / "scorer.safetensors").write_bytes(pack_network(SyncNetwork(NetworkConfig()), {"auc": 0.5}))
    pixels, sound, _ = clip(0, "bounce")
    found = Measures(sync_weights=str(tmp_path / "scorer.safetensors"))(pixels, sound, 24.0, 16000)
    assert "learned_sync" in found and "impacts_f1" not in found
    with pytest.raises(DataError, match="nowhere"):
        Measures(sync_weights=str(tmp_path / "nowhere"))
