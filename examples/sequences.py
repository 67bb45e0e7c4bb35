"""Sequences of different lengths: who speaks? Attention beside mean pooling.

Nine men say two Japanese vowels; each utterance is 7 to 29 frames of 12
coefficients of a linear prediction (Kudo, Toyama & Shimbo 1999, as the package
`aeon` ships it: 270 utterances to train with, 370 to test with). Utterances are
padded with NaN to one length; a padded one has the kernel of the short one.
Classifies with the kernels of networks that average over frames, with and
without attention before. Trains with ten utterances of each man, which takes
some minutes on two cores; `--all` trains with thirty, as published results do,
and takes half an hour. `make sequences` installs the data and starts.
"""

import argparse
import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from taylor_softmax import stax

CHANNELS = 12
# Utterances of each speaker to train with, unless all are asked for.
FEW = 10
# Rows of the kernel that are computed at once.
ROWS = 45
RIDGES = 10.0 ** np.arange(-6, 1)
PUBLISHED = {
    "Kudo et al. 1999": 0.941,
    "their hidden Markov models": 0.962,
    "nearest neighbour, time warping (Bagnall et al. 2018)": 0.949,
}

# neural_tangents can't check that branches of a network are independent.
warnings.filterwarnings("ignore", message="`FanIn` layers assume")


def attention() -> Any:
    """Frames see those around them, and each other by what they are."""
    attend = stax.GlobalSelfAttention(
        CHANNELS,
        n_chan_key=CHANNELS,
        n_chan_val=CHANNELS,
        n_heads=2,
        linear_scaling=False,
        W_query_std=2.0,
    )
    body = stax.serial(stax.LayerNorm(), attend)
    both = stax.parallel(stax.Identity(), body)
    return stax.serial(stax.FanOut(2), both, stax.FanInSum())


def network(*middle: Any) -> Any:
    dense = stax.Dense(CHANNELS, W_std=2**0.5, b_std=0.1)
    ends = stax.GlobalAvgPool(), stax.Dense(1)
    first = dense, stax.Relu(), dense
    return stax.serial(*first, *middle, stax.Relu(), *ends)


def read(part: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Utterances, `(frames, channels)` each, and who speaks."""
    found = importlib.util.find_spec("aeon")
    if found is None or found.origin is None:
        raise SystemExit("This needs the data of `aeon`: run `make sequences`.")
    folder = Path(found.origin).parent / "datasets" / "data" / "JapaneseVowels"
    text = (folder / f"JapaneseVowels_{part}.ts").read_text()
    utterances, speakers = [], []
    for line in text.partition("@data")[2].split():
        *channels, speaker = line.split(":")
        values = [[float(x) for x in of.split(",")] for of in channels]
        utterances.append(np.transpose(values))
        speakers.append(int(speaker) - 1)
    return utterances, np.array(speakers)


def load(all_of_them: bool) -> tuple[Array, np.ndarray, Array, np.ndarray]:
    """Padded utterances `(n, frames, channels)` and speakers, twice."""
    (train, train_speakers), (test, test_speakers) = read("TRAIN"), read("TEST")
    if not all_of_them:
        speakers = range(max(train_speakers) + 1)
        first = [np.flatnonzero(train_speakers == k)[:FEW] for k in speakers]
        train = [train[i] for i in np.concatenate(first)]
        train_speakers = np.repeat(speakers, FEW)
    frames = np.concatenate(train)
    mean, std = frames.mean(0), frames.std(0)
    longest = max(len(x) for x in train + test)

    def padded(utterances: list[np.ndarray]) -> Array:
        x = np.full((len(utterances), longest, CHANNELS), np.nan, np.float32)
        for row, utterance in zip(x, utterances, strict=True):
            row[: len(utterance)] = (utterance - mean) / std
        return jnp.asarray(x)

    return padded(train), train_speakers, padded(test), test_speakers


def kernel(kernel_fn: Any, x: Array, others: Array, what: str) -> np.ndarray:
    """The NNGP of all of `x` with all `others`, some rows after the other."""
    block = jax.jit(
        lambda x1, x2: kernel_fn(x1, x2, "nngp", mask_constant=jnp.nan)
    )
    start, parts = time.time(), []
    for done in range(0, len(x), ROWS):
        parts.append(np.asarray(block(x[done : done + ROWS], others)))
        share = min(1, (done + ROWS) / len(x))
        left = (time.time() - start) * (1 / share - 1)
        progress(f"  {what}: {share:.0%}, {left:.0f} s left")
    return np.concatenate(parts)


def classify(
    train: np.ndarray, speakers: np.ndarray, cross: np.ndarray
) -> tuple[np.ndarray, float]:
    """Least squares, with the ridge that leaving one out likes best."""
    targets = np.eye(speakers.max() + 1)[speakers] - 1 / (speakers.max() + 1)
    best = (-1.0, 0.0, cross)
    for share in RIDGES:
        ridge = share * np.trace(train) / len(train)
        inverse = np.linalg.inv(train + ridge * np.eye(len(train)))
        weights = inverse @ targets
        left_out = targets - weights / np.diag(inverse)[:, None]
        score = float(np.mean(np.argmax(left_out, 1) == speakers))
        if score > best[0]:
            best = score, share, cross @ weights
    return np.argmax(best[2], 1), best[1]


def progress(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="train with all")
    all_of_them = parser.parse_args().all
    progress("started: " + ("half an hour" if all_of_them else "some minutes"))
    data = load(all_of_them)
    x_train, train_speakers, x_test, test_speakers = data
    shape = f"{len(x_train)} utterances, tested on {len(x_test)}"
    print(f"Who speaks, of nine? Accuracy; trained on {shape}.")
    networks = {
        "mean over frames": network(),
        "attention, then mean over frames": network(attention()),
    }
    for name, (_, _, kernel_fn) in networks.items():
        progress(name)
        train = kernel(kernel_fn, x_train, x_train, "training utterances")
        cross = kernel(kernel_fn, x_test, x_train, "test utterances")
        # Estimates of both triangles differ by their errors.
        train = (train + train.T).astype(float) / 2
        guesses, ridge = classify(train, train_speakers, cross)
        score = np.mean(guesses == test_speakers)
        print(f"  {name}: {score:.3f} (ridge {ridge:g})", flush=True)
    for name, score in PUBLISHED.items():
        print(f"  published, trained with all, {name}: {score:.3f}")


if __name__ == "__main__":
    main()
