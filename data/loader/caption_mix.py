"""Chooses the captioner of each sample from a mix, at random by weight.

The draw is a function of (seed, global sample number), so it is the same at every number of ranks and threads and after
every restart, and it touches neither the order of the samples nor any other random number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from data.chance import philox
from data.dataset.index import DatasetIndex
from data.dataset.record import text_fingerprint
from data.errors import DataError

Weight = float | str | Fraction


def exact_weights(given: Mapping[str, Weight]) -> dict[str, Fraction]:
    """Shares that sum to 1, sorted by name; a number means what its decimal form says (0.3 is 3/10).

    DataError for a weight that is not finite or not above 0.
    """
    exact: dict[str, Fraction] = {}
    for name, weight in given.items():
        try:
            exact[name] = Fraction(str(weight))
        except (ValueError, ZeroDivisionError):  # also inf and nan
            exact[name] = Fraction(0)
        if exact[name] <= 0:
            raise DataError(f"captioner {name} has weight {weight}: give a finite number above 0, or leave it out")
    total = sum(exact.values())
    return {name: exact[name] / total for name in sorted(exact)}


def describe_mix(weights: Mapping[str, Fraction]) -> dict[str, str]:
    """Plain values for the data state; `exact_weights` takes them back."""
    return {name: str(weight) for name, weight in weights.items()}


class CaptionMix:
    """The captions of several datasets, read by one mix of captioners.

    Args:
        indices: the datasets.
        weights: shares of the captioners (see exact_weights); {}: each dataset's first captioner, and nothing is drawn.
        seed: of the draw.

    `names[d]` are the captioners whose captions dataset d can give: those of the mix that it has. DataError when a
    captioner of the mix is in no dataset, or a dataset has none of the mix.
    """

    def __init__(self, indices: Sequence[DatasetIndex], weights: Mapping[str, Weight], seed: int) -> None:
        self.weights = exact_weights(weights)
        self._indices, self._seed = list(indices), seed
        known = sorted({name for index in indices for name in index.captioners})
        if unknown := [name for name in self.weights if name not in known]:
            raise DataError(
                f"captioner {unknown[0]!r} is in no dataset; there are {', '.join(known) or 'none'}: correct "
                f"data.captioners, or write its captions first (mova caption captioner={unknown[0]})"
            )
        self.names = [self._names_of(index) for index in indices]

    def _names_of(self, index: DatasetIndex) -> list[str]:
        names = [name for name in self.weights if name in index.captioners] if self.weights else index.captioners[:1]
        if not names:
            mix = f"of the mix ({', '.join(self.weights)})" if self.weights else "at all"
            there = f"it has {', '.join(index.captioners)}" if index.captioners else "it has no captioner"
            raise DataError(f"dataset {index.root} has no captions {mix}, {there}: add one of these to data.captioners")
        return names

    def texts(self) -> list[dict[str, str]]:
        """By dataset: the text fingerprint of each captioner that is read."""
        return [{name: text_fingerprint(index.record, name) for name in names}
                for index, names in zip(self._indices, self.names, strict=True)]  # fmt: skip

    def choose(self, dataset: int, row: int, sample: int) -> str:
        """The captioner whose caption a sample takes. row: of the dataset; sample: global sample number.

        Where the one that is drawn has no caption of that window, another is drawn from the rest, by their weights and
        by what is left of the same number; where none has one, any does, since all hold the empty prompt there.
        """
        names, index = self.names[dataset], self._indices[dataset]
        if len(names) == 1:
            return names[0]
        left = dict(self.weights)
        number = Fraction(int(philox(self._seed, "captioner", sample).random_raw()), 1 << 64)  # uniform in [0, 1)
        while left:
            point = number * sum(left.values())
            drawn = next(iter(left))
            for drawn, weight in left.items():  # noqa: B007
                if point < weight:
                    break
                point -= weight
            if drawn in names and not index.is_absent(row, drawn):
                return drawn
            number = point / left.pop(drawn)  # uniform again, given that this one was drawn
        return names[0]

    def count_empty(self, datasets: np.ndarray, rows: np.ndarray) -> int:
        """How many of these samples (dataset and row, [n] each) have no caption by any captioner of the mix."""
        pairs = zip(datasets.tolist(), rows.tolist(), strict=True)
        return sum(all(self._indices[d].is_absent(row, name) for name in self.names[d]) for d, row in pairs)
