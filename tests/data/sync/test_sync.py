"""Synchronization scorers: SyncNet's parts against known numbers, lags and their signs, a training that works."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.errors import DataError
from data.media import open_media
from data.sync import SCORERS, load_scorer
from data.sync.inputs import retime
from data.sync.learned import (
    RATE,
    REACH,
    STEPS,
    LearnedScorer,
    NetworkConfig,
    SyncNetwork,
    judge,
    load_network,
    pack_network,
    prepare_pictures,
    prepare_sound,
    small_pictures,
)
from data.sync.syncnet import SHIFT, SyncNet, SyncNetScorer, compare, face_pictures, mfcc
from data.sync.trainer import Excerpt, TrainSyncConfig, area_under_curve, crop_pair, draw_batch, pair_loss, train_sync
from data.sync.weak import WeakScorer
from data.synthesize import SynthesizeConfig, write_clip

BAR = 0.85  # of the areas under the curve after the short training of this test


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are small: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flashes_and_clicks(lag: float, fps: float = 24.0, seconds: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A picture that is bright or dark frame by frame, and noise that is loud when it is bright, `lag` s later."""
    random = np.random.default_rng(seed)
    bright = torch.from_numpy(random.integers(0, 2, round(seconds * fps) + 200)).float()
    frames = (2 * bright[100 : 100 + round(seconds * fps)] - 1)[:, None, None, None].expand(-1, 3, 16, 16)
    times = torch.arange(round(seconds * 16000)) / 16000 - lag
    loud = bright[(times * fps + 1e-4).floor().long() + 100]
    noise = torch.from_numpy(random.standard_normal(len(times))).float()
    return frames.contiguous(), noise * (0.001 + 0.2 * loud)


# --- interface ---


def test_scorers_are_found_by_name_and_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'synchformer'.*syncnet, learned, weak"):
        load_scorer("synchformer")
    with pytest.raises(DataError, match=r"syncnet_v2\.model"):
        load_scorer("syncnet")
    with pytest.raises(DataError, match=r"nowhere\.model does not exist.*syncnet_v2\.model"):
        load_scorer("syncnet", str(tmp_path / "nowhere.model"))
    with pytest.raises(DataError, match=r"mova train-sync"):
        load_scorer("learned", str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(DataError, match="no weights"):
        load_scorer("weak", "file")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Files of random weights by scorer."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(SyncNet().state_dict(), folder / "syncnet.model")
    (folder / "a.safetensors").write_bytes(pack_network(SyncNetwork(NetworkConfig()), {"auc_shift": 0.5}))
    return {"syncnet": str(folder / "syncnet.model"), "learned": str(folder / "a.safetensors"), "weak": None}


@pytest.mark.parametrize("name", SCORERS)
def test_what_cannot_be_measured_is_nan_and_wrong_shapes_are_refused(
    name: str, untrained: dict[str, str | None]
) -> None:
    scorer = load_scorer(name, untrained[name])
    assert scorer.name == name and name in scorer.fingerprint
    frames, sound = flashes_and_clicks(0.0, seconds=0.5 if name == "syncnet" else 1.25)  # it is slow
    values = scorer.score(frames, sound, 24.0)
    assert tuple(values) == scorer.keys and all(math.isfinite(value) for value in values.values())
    for nothing in (
        scorer.score(frames, torch.zeros(20000), 24.0),
        scorer.score(frames, torch.zeros(0), 24.0),
        scorer.score(frames[:2], sound[:1333], 24.0),
    ):
        assert tuple(nothing) == scorer.keys and all(math.isnan(value) for value in nothing.values())
    for bad in ((frames[:, 0], sound, 24.0), (frames, sound[None], 24.0), (frames, sound, 0.0)):
        with pytest.raises(ValueError):
            scorer.score(*bad)


@pytest.mark.parametrize("name", SCORERS)
def test_grey_pictures_stand_for_colours_where_a_scorer_sees_none(name: str, untrained: dict[str, str | None]) -> None:
    scorer = load_scorer(name, untrained[name])
    assert scorer.colour == (name == "syncnet")
    generator = torch.Generator().manual_seed(4)
    frames = torch.rand(73, 3, 60, 90, generator=generator) * 2 - 1
    sound = 0.1 * torch.randn(round(73 / 24 * 16000), generator=generator)
    grey = (frames.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).float()
    if scorer.colour:
        with pytest.raises(ValueError, match="expected"):
            scorer.score(grey, sound, 24)
        return
    expected = scorer.score(frames, sound, 24)
    assert not any(map(math.isnan, expected.values()))
    assert scorer.score(grey, sound, 24) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_frames_are_chosen_by_time() -> None:
    assert retime(torch.arange(48), 24, 24).tolist() == list(range(48))
    assert retime(torch.arange(60), 60, 24).tolist()[:5] == [1, 3, 6, 8, 11]  # middles 20.8, 62.5, 104.2 ms, ...
    longer = retime(torch.arange(24), 24, 25)
    assert len(longer) == 25 and longer[0] == 0 and longer[-1] == 23


# --- SyncNet ---

CHANNELS = [(0, 1), (4, 5), (8, 9), (11, 12), (14, 15), (18, 19)]  # numbers of convolution and batch norm
SOUND = [(64, 1, 3, 3), (192, 64, 3, 3), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3), (512, 256, 5, 4)]
PICTURE = [
    (96, 3, 5, 7, 7),
    (256, 96, 1, 5, 5),
    (256, 256, 1, 3, 3),
    (256, 256, 1, 3, 3),
    (256, 256, 1, 3, 3),
    (512, 256, 1, 6, 6),
]


def published_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published file."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    for stream, kernels in (("netcnnaud", SOUND), ("netcnnlip", PICTURE)):
        for (convolution, normalization), kernel in zip(CHANNELS, kernels, strict=True):
            shapes[f"{stream}.{convolution}.weight"] = kernel
            shapes[f"{stream}.{convolution}.bias"] = kernel[:1]
            norm(f"{stream}.{normalization}", kernel[0])
    for head in ("netfcaud", "netfclip"):
        shapes[f"{head}.0.weight"], shapes[f"{head}.0.bias"] = (512, 512), (512,)
        norm(f"{head}.1", 512)
        shapes[f"{head}.3.weight"], shapes[f"{head}.3.bias"] = (1024, 512), (1024,)
    return shapes


def test_syncnet_has_the_published_parameters() -> None:
    found = {name: tuple(tensor.shape) for name, tensor in SyncNet().state_dict().items()}
    assert found == published_names()


def test_syncnet_weights_old_wrong_and_hostile(tmp_path: Path) -> None:
    state = SyncNet().state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old")
    loaded = SyncNetScorer(str(tmp_path / "old")).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in old.items())
    torch.save({**state, "netfclip.3.bias": torch.zeros(3)}, tmp_path / "wrong")
    with pytest.raises(DataError, match=r"netfclip\.3\.bias"):
        SyncNetScorer(str(tmp_path / "wrong"))
    torch.save({**state, "more": torch.zeros(3)}, tmp_path / "more")
    with pytest.raises(DataError, match="more"):
        SyncNetScorer(str(tmp_path / "more"))
    torch.save(torch.nn.ReLU(), tmp_path / "object")  # unpickling it could run code
    with pytest.raises(DataError, match="no file of weights"):
        SyncNetScorer(str(tmp_path / "object"))
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(DataError, match="no file of weights"):
        SyncNetScorer(str(tmp_path / "text"))


def test_one_pass_over_all_frames_equals_every_window_alone() -> None:
    torch.manual_seed(1)
    network = SyncNet().eval()
    pictures = torch.rand(3, 7, 224, 224) * 255
    with torch.inference_mode():
        together = network.see(pictures)
        assert together.shape == (3, 1024)
        for start in range(3):
            torch.testing.assert_close(network.see(pictures[:, start : start + 5])[0], together[start])
        assert network.hear(torch.randn(2, 1, 13, 20)).shape == (2, 1024)


def test_face_pictures_are_bgr_squares() -> None:
    frames = torch.full((2, 3, 30, 40), -1.0)
    frames[:, 0, :, 5:35] = 1.0  # red in the middle square
    pictures = face_pictures(frames)
    assert pictures.shape == (3, 2, 224, 224)
    assert pictures[2].min() > 254 and pictures[:2].max() < 1


def test_mfcc_has_the_values_of_python_speech_features() -> None:
    time = np.arange(8000) / 16000
    sweep = torch.from_numpy((0.3 * np.sin(2 * np.pi * (200 * time + 900 * time * time))).astype(np.float32))
    values = mfcc(sweep)
    assert values.shape == (49, 13)
    expected = {  # mfcc(int16, 16000) of version 0.6, its other arguments at their defaults
        0: [18.209, 21.7274, 12.3324, 6.1195, -0.2679, -7.5379, -13.8046, -19.8138, -23.4484, -25.1476],
        25: [20.3028, 18.9187, -6.8766, -27.0826, -30.6966, -15.6184, 8.8441, 24.529, 22.8147, 5.9097],
        48: [21.0146, 13.281, -23.3159, -29.8821, -1.9364, 25.5935, 20.5601, -9.6797, -26.1327, -11.4703],
    }
    for frame, numbers in expected.items():
        assert values[frame, :10].tolist() == pytest.approx(numbers, abs=2e-3)


@pytest.mark.parametrize("late", [-9, 0, 4])
def test_distances_find_a_planted_offset(late: int) -> None:
    torch.manual_seed(2)
    features = torch.randn(80, 1024)
    offset, distance, confidence = compare(features[20:60], features[20 - late : 60 - late])
    assert offset == -late and abs(offset) <= SHIFT  # published sign: above 0 where the sound is early
    # only the ends, where a shift leaves nothing to compare with, are apart
    assert distance < 32.5 * abs(late) / 40 + 0.1 and confidence > 20 * (1 - abs(late) / 40)


class Oracle:
    """Embeddings that tell brightness and loudness of the five frames: what SyncNet would learn of flashes."""

    def see(self, pictures: Tensor) -> Tensor:
        assert pictures.shape[2:] == (224, 224)
        return (pictures.mean((0, 2, 3)) > 127).float().unfold(0, 5, 1)

    def hear(self, spectra: Tensor) -> Tensor:
        assert spectra.shape[1:] == (1, 13, 20)
        return (spectra[:, 0, 0].unflatten(1, (5, 4))[..., 1:3].mean(2) > 15).float()


@pytest.mark.parametrize(("late", "fps"), [(0, 25.0), (6, 25.0), (-4, 25.0), (5, 50.0)])
def test_syncnet_scoring_finds_a_planted_offset(late: int, fps: float, untrained: dict[str, str | None]) -> None:
    scorer = SyncNetScorer(untrained["syncnet"])
    scorer.network = Oracle()  # type: ignore[assignment]
    frames, sound = flashes_and_clicks(late / 25, fps=25.0)
    frames = frames.repeat_interleave(round(fps / 25), 0)
    values = scorer.score(frames, sound, fps)
    assert values["syncnet_offset"] == -late and values["lse_c"] > 0.2, values


# --- weak ---


@pytest.mark.parametrize("lag", [-0.4, 0.0, 0.3])
def test_weak_finds_the_lag_of_single_impulses(lag: float) -> None:
    events = np.array([0.9, 1.4, 2.25])
    frames = torch.zeros(72, 3, 16, 16)
    for event in events:
        frames[round(event * 24) :] = 0.5 - frames[round(event * 24) - 1]  # one edge an event
    sound = torch.zeros(48000)
    for event in events + lag:
        sound[round(event * 16000) :][:160] += 0.5
    values = WeakScorer().score(frames, sound, 24.0)
    assert values["weak_lag"] == pytest.approx(lag, abs=0.03)
    assert values["weak_sync"] > 0.25 if lag == 0 else values["weak_sync"] < 0.2


# --- learned ---


def test_evidence_is_the_sum_over_the_shared_time_of_every_lag() -> None:
    torch.manual_seed(3)
    network = SyncNetwork(NetworkConfig())
    for length in (26, 80):  # shorter and longer than the lags reach
        seen, heard = torch.randn(2, length, 64), torch.randn(3, length, 64)
        found = network.evidence(seen, heard)
        assert found.shape == (2, 3, 2 * REACH + 1)
        for lag in (-REACH, -25, -3, 0, 1, 25, REACH):
            pairs = [(t, t + lag) for t in range(length) if 0 <= t + lag < length]
            sums = sum((torch.einsum("id,jd->ij", seen[:, t], heard[:, s]) for t, s in pairs), torch.zeros(2, 3))
            torch.testing.assert_close(found[:, :, lag + REACH], sums * network.scale.exp(), rtol=1e-3, atol=1e-4)


def test_judgement_of_known_evidence() -> None:
    logits = torch.full((3, 2 * REACH + 2), -20.0)
    logits[0, REACH] = 5
    logits[1, REACH + 12] = 5
    logits[2, -1], logits[2, REACH - 6] = 30, -15
    in_step, lag = judge(logits)
    assert in_step[0] > 0.999 and in_step[1] < 1e-6 and in_step[2] < 1e-6
    assert lag.tolist() == pytest.approx([0, 12 / RATE, -6 / RATE], abs=0.005)
    edges = torch.full((4, 2 * REACH + 2), -20.0)
    for row, steps in enumerate((-2, 2, -3, 3)):  # 0.083 s count as in step, 0.125 s don't
        edges[row, REACH + steps] = 5
    assert (judge(edges)[0] > 0.5).tolist() == [True, True, False, False]


def test_loss_wants_the_own_lag_and_refuses_the_sounds_of_others() -> None:
    lags = torch.tensor([[0.0, 0.5], [-0.25, 0.02]])
    logits = torch.full((2, 4, 2 * REACH + 2), -30.0)
    for clip in range(2):
        for sound in range(4):
            if sound // 2 == clip:
                step = lags[clip, sound % 2] * RATE + REACH
                low = int(step.floor())
                part = float(step - low)
                logits[clip, sound, low] = math.log(1 - part + 1e-9)
                logits[clip, sound, low + 1] = math.log(part + 1e-9)
            else:
                logits[clip, sound, -1] = 0
    good = pair_loss(logits, lags)
    assert good < 0.4  # what is left: a lag between two steps
    assert pair_loss(logits, -lags) > good + 5  # the sign counts
    assert pair_loss(logits.flip(0), lags) > good + 5  # so does which sound is whose
    logits[0, 2:, -1], logits[0, 2:, REACH] = -30, 0  # the sounds of another, taken for own ones
    assert pair_loss(logits, lags) > good + 5


def test_a_shifted_example_has_its_sound_late_and_real_to_the_ends() -> None:
    length = 97
    pictures = torch.arange(length, dtype=torch.uint8)[:, None, None].expand(-1, 8, 8).contiguous()
    piece = Excerpt(
        "a", pictures, torch.arange(round(length / RATE * 16000)).float() / 16000
    )  # the sound tells its time
    random = np.random.default_rng(4)
    for lag in (-1.0, -0.61, 0.0, 0.33, 1.0):
        for _ in range(20):
            first = crop_pair(piece, 49, [lag], random)
            seen = piece.see(first, 49)
            heard = piece.hear(first / RATE - lag, 49 / RATE)
            time_seen = float((seen[0, 0, 0] + 1) * 127.5) / RATE
            assert len(seen) == 49 and len(heard) == round(49 / RATE * 16000)
            assert float(heard[0]) == pytest.approx(time_seen - lag, abs=1e-3)  # what is seen now is heard `lag` later
            assert float(heard[-2]) == pytest.approx(float(heard[0]) + 49 / RATE, abs=1e-3)  # no padding
    config = TrainSyncConfig(lags=4)
    _, spectra, lags = draw_batch([piece, piece], 48, config, 32, random)
    assert spectra.shape == (8, 32, 48 * STEPS) and lags.shape == (2, 4)
    assert all(len(set(row.sign().tolist())) == 1 for row in lags)


def test_volume_and_exposure_do_not_matter_but_time_does() -> None:
    sound = torch.zeros(32000)
    sound[12000:12080] = 0.5  # 0.75 s
    spectra = prepare_sound(sound, 48, 32)
    assert spectra.shape == (32, 48 * STEPS)
    torch.testing.assert_close(prepare_sound(0.01 * sound, 48, 32), spectra, rtol=1e-3, atol=1e-3)
    middle = float((torch.softmax(20 * spectra.mean(0), 0) * torch.arange(48 * STEPS)).sum() + 0.5) / RATE / STEPS
    assert middle == pytest.approx(0.7525, abs=0.006)
    pictures = torch.rand(5, 8, 8)
    darker = prepare_pictures(0.5 * pictures - 0.3)
    torch.testing.assert_close(darker, prepare_pictures(pictures), rtol=0.3, atol=0.3)
    assert abs(float(darker.mean())) < 1e-5


def test_area_under_curve_counts_ties_half() -> None:
    assert area_under_curve([1.0, 0.9], [0.1, 0.2]) == 1.0
    assert area_under_curve([0.5], [0.5]) == 0.5
    assert area_under_curve([0.5, 0.9], [0.7, 0.1]) == 0.75
    assert math.isnan(area_under_curve([], [0.5]))


def test_damaged_and_foreign_scorers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = pack_network(SyncNetwork(NetworkConfig()), {"auc_shift": 0.75})
    path.write_bytes(content)
    network, quality = load_network(path)
    assert quality == {"auc_shift": 0.75} and asdict(network.config) == asdict(NetworkConfig())
    first = LearnedScorer(str(path)).fingerprint
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match="no sync scorer"):
        LearnedScorer(str(path))
    path.write_bytes(content.replace(b"mova-sync-1", b"mova-sync-0"))
    with pytest.raises(DataError, match="format mova-sync-0"):
        LearnedScorer(str(path))
    path.write_bytes(pack_network(SyncNetwork(NetworkConfig()), {}))
    assert LearnedScorer(str(path)).fingerprint != first


# --- training ---


def make_clips(folder: Path, clips: int, seed: int, frames: int) -> Path:
    """Synthesized clips, made in this process: for so few, starting others takes longer."""
    folder.mkdir()
    for number in range(clips):
        write_clip(folder, number, SynthesizeConfig(output=str(folder), clips=clips, seed=seed, frames=frames))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync")
    make_clips(folder / "train", 96, seed=11, frames=97)
    (folder / "train" / "broken.mp4").write_bytes(b"no video")
    train_sync(
        TrainSyncConfig(source=str(folder / "train"), output=str(folder / "scorer.safetensors"), steps=80, workers=2)
    )
    return folder / "scorer.safetensors"


@pytest.mark.slow
def test_a_short_training_tells_sync_from_shifted_and_swapped(trained: Path, tmp_path: Path) -> None:
    """The whole way: mp4 files of another seed, decoded, through the interface that the curation uses."""
    record = json.loads(trained.with_suffix(".json").read_text())
    assert list(record["clips"]["refused"]) == ["broken.mp4"]
    assert record["clips"]["training"] + record["clips"]["held_out"] == 96 and record["clips"]["held_out"] > 8
    scorer = load_scorer("learned", str(trained))
    assert isinstance(scorer, LearnedScorer) and scorer.quality == record["quality"]
    folder = make_clips(tmp_path / "clips", 48, seed=12, frames=97)
    random = np.random.default_rng(0)
    scores: dict[str, list[float]] = {"in step": [], "shifted": [], "swapped": []}
    found = []
    clips = []
    for path in sorted(folder.glob("*.mp4")):
        with open_media(path) as media:
            assert media.sound_span is not None
            frames = media.frames(1.0, 49, 24, 64, 64).transpose(0, 1)
            clips.append((frames, media.sound(0.0, round(media.sound_span[1] * 16000))))
    samples = round(49 / 24 * 16000)
    for number, (frames, audio) in enumerate(clips):
        for kind in ("in step", "shifted", "swapped"):
            lag = random.uniform(0.2, 1.0) * random.choice((-1, 1)) if kind == "shifted" else 0.0
            sound = clips[(number + 7) % len(clips)][1] if kind == "swapped" else audio
            start = round((1.0 - lag) * 16000)
            values = scorer.score(frames, sound[start : start + samples], 24.0)
            scores[kind].append(values["learned_sync"])
            if kind != "swapped":
                found.append(abs(values["learned_lag"] - lag) <= 0.1)
    shifted = area_under_curve(scores["in step"], scores["shifted"])
    swapped = area_under_curve(scores["in step"], scores["swapped"])
    print(f"auc {shifted:.3f} {swapped:.3f} lag {np.mean(found):.2f} quality {record['quality']}")
    assert shifted >= BAR and swapped >= BAR and np.mean(found) >= 0.4, (shifted, swapped, np.mean(found))
    # the same window at another frame rate and size
    frames, audio = clips[0]
    sound = audio[16000 : 16000 + samples]
    plain = scorer.score(frames, sound, 24.0)
    twice = scorer.score(frames.repeat_interleave(2, 0).repeat_interleave(2, 2), sound, 48.0)
    assert abs(twice["learned_sync"] - plain["learned_sync"]) < 0.1


def test_command_line_names_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.train_sync", f"source={tmp_path}", "output=a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 1 and "holds no video files" in done.stderr and "Traceback" not in done.stderr
    for setting in ({"shift": 2.0}, {"batch": 1}, {"holdout": 1.0}, {"output": "a.pt"}, {"device": "cuda:9"}):
        with pytest.raises(DataError, match=next(iter(setting))):
            train_sync(TrainSyncConfig(**{"source": str(tmp_path), "output": "a.safetensors", **setting}))  # type: ignore


def test_clips_that_are_too_short_are_named(tmp_path: Path) -> None:
    folder = make_clips(tmp_path / "clips", 3, seed=1, frames=45)
    with pytest.raises(DataError, match=r"0 pieces to train on.*3 not used"):
        train_sync(TrainSyncConfig(source=str(folder), output=str(tmp_path / "a.safetensors")))


def test_grey_pictures_of_every_size() -> None:
    grey = small_pictures(torch.full((70, 3, 30, 50), 0.25), 24, 48)
    assert grey.shape == (70, 48, 48)
    torch.testing.assert_close(grey, torch.full_like(grey, 0.25))
