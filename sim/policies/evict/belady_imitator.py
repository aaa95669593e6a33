"""A small network a layer that has learned, on another trace, how soon a block comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from sim.policies.base import Calibration, EvictionPolicy, PolicyContext, check_whole

Array = Any  # numpy.ndarray

RATES = (1 / 8, 1 / 64)
"""Of the two smoothed frequencies (chosen here): they look back over some 8 and 64 passes."""

FEATURES = 1 + len(RATES)
AGES = 1024  # beyond so many passes without a use, a frequency counts as 0

FADING = np.array([[(1.0 - rate) ** age for age in range(AGES)] + [0.0] for rate in RATES])
"""What is left of each frequency after a number of passes without a use, float64 [2, AGES + 1]."""


class Networks(NamedTuple):
    """One network a layer: reuse = out_bias + sum over h of out[h] * max(0, bias[h] + sum over f of into[f, h] * x[f]).

    Float64. L layers, F features, H hidden units.
    """

    into: Array  # [L, F, H]
    bias: Array  # [L, H]
    out: Array  # [L, H]
    out_bias: Array  # [L]


class BeladyImitator(EvictionPolicy):
    """Evicts the block that a network expects to come back last; one that misses need not be kept (bypass).

    The network of its layer reads three features of a block, as of the last decision: 1 / (passes since its last use
    + 1), and its frequency of use, smoothed over about 8 and about 64 passes. It was trained in the constructor, on
    the calibration trace, to predict the passes until the next use, cut off at ``horizon``: Adam on the mean squared
    error, all layers at once, seeded. Sources: FlashMoE, arXiv 2601.17063, and CECAR, whose networks also learn the
    distances that Belady's rule compares from recency and frequency. Departures: one small network for all experts of
    a layer, as in CECAR; bypass, as ``belady`` here.
    """

    name: ClassVar[str] = "belady-imitator"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    bypass: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden": 8,  # chosen here, as all that follow
        "horizon": 16,  # passes
        "passes": 4096,  # of the calibration trace that are read at most
        "samples": 512,  # passes of these that are learned from
        "updates": 400,
    }

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if context.calibration is None:
            raise ValueError("belady-imitator must be given a calibration trace, got none")
        check_whole(self.options, hidden=512, horizon=1 << 20, passes=65_536, samples=8192, updates=1_000_000)
        self.networks = _trained(context.calibration, context, self.options)
        self._event = -1
        self._last = np.full(context.blocks, -1, np.int64)
        self._often = np.zeros((len(RATES), context.blocks))  # frequencies as of the last use

    @property
    def flops_a_block(self) -> int:
        """Floating-point operations to rank one block once: its features, and its network."""
        return 3 + len(RATES) + (2 * FEATURES + 3) * int(self.options["hidden"])

    @property
    def flops_a_decision(self) -> int:
        """Those of ranking a full pool, the mean one where they differ, together with the misses of one token."""
        slots = self.context.capacity // min(self.context.weights, default=1)
        return (slots + self.context.top_k) * self.flops_a_block

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._event = event
        used = np.array(blocks, np.int64)
        faded = FADING[:, self._ages(used)]
        for often, fade, rate in zip(self._often, faded, RATES, strict=True):
            often[used] = often[used] * fade + rate
        self._last[used] = event

    def _ages(self, blocks: Array) -> Array:
        """Passes since the last use, at most :data:`AGES`; never used counts as that."""
        ages = (self._event - self._last[blocks]) // self.context.layers
        return np.where(self._last[blocks] < 0, AGES, np.minimum(ages, AGES))

    def key(self, block: int) -> float:
        return self.keys([block])[0]

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        chosen = np.array([*blocks], np.int64)
        ages = self._ages(chosen)
        features = [1.0 / (ages + 1.0), *(self._often[:, chosen] * FADING[:, ages])]
        into, bias, out, out_bias = (array[chosen // self.context.experts] for array in self.networks)
        reuse = out_bias
        for unit in range(bias.shape[1]):  # term by term, in the order of the compiled twin
            level = bias[:, unit]
            for place, feature in enumerate(features):
                level = level + into[:, place, unit] * feature
            reuse = reuse + out[:, unit] * np.maximum(level, 0.0)
        worth: list[float] = (-reuse).tolist()
        return worth


_CACHE: WeakKeyDictionary[Calibration, dict[tuple[Any, ...], Networks]] = WeakKeyDictionary()


def _trained(calibration: Calibration, context: PolicyContext, options: Mapping[str, Any]) -> Networks:
    """The networks, trained once for every calibration trace: a policy is made anew for each fresh sequence."""
    known = _CACHE.setdefault(calibration, {})
    key = (context.layers, context.experts, context.seed, *sorted(options.items()))
    if key not in known:
        used = usage(calibration, context, options["passes"])
        features, reuse = examples(used, options["horizon"], options["samples"])
        known[key] = train(features, reuse, options["hidden"], options["updates"], np.random.default_rng(context.seed))
    return known[key]


def usage(calibration: Calibration, context: PolicyContext, passes: int) -> Array:
    """Which blocks each of the first ``passes`` passes of the calibration trace used: bool [S, L, E]."""
    used: list[Array] = []
    for event, blocks in calibration.events():
        number = event // context.layers
        if number >= passes:
            break
        while len(used) <= number:
            used.append(np.zeros(context.blocks, bool))
        used[number][[*blocks]] = True
    return np.array(used, bool).reshape(-1, context.layers, context.experts)


def examples(used: Array, horizon: int, samples: int) -> tuple[Array, Array]:
    """What there is to learn: features float64 [L, n, F], and the share of ``horizon`` until the next use, [L, n].

    Every expert, as of ``samples`` evenly spaced passes of ``used``, bool [S, L, E]. The last passes are left out, for
    their next uses are not known.
    """
    known = max(1, len(used) - horizon)
    learned = np.unique(np.linspace(0, known - 1, min(known, samples)).astype(int))
    features, reuse = _features(used, learned), _reuse(used, learned, horizon)
    shape = used.shape[1], len(learned) * used.shape[2]
    return features.transpose(2, 0, 3, 1).reshape(*shape, FEATURES), reuse.transpose(1, 0, 2).reshape(shape)


def _features(used: Array, learned: Array) -> Array:
    """The features as of the passes ``learned`` (ascending), float64 [n, F, L, E]."""
    out = np.empty((len(learned), FEATURES, *used.shape[1:]))
    age, often = np.full(used.shape[1:], AGES), np.zeros((len(RATES), *used.shape[1:]))
    rates = np.array(RATES)[:, None, None]
    row = 0
    for number, now in enumerate(used[: learned[-1] + 1]):
        age = np.where(now, 0, np.minimum(age + 1, AGES))
        often = often * (1.0 - rates) + rates * now
        if number == learned[row]:
            out[row] = [1.0 / (age + 1.0), *often]
            row += 1
    return out


def _reuse(used: Array, learned: Array, horizon: int) -> Array:
    """Passes from those ``learned`` until the next use, at most ``horizon`` and as a share of it: [n, L, E]."""
    out = np.empty((len(learned), *used.shape[1:]))
    ahead = np.full(used.shape[1:], horizon)
    row = len(learned) - 1
    for number in range(len(used) - 1, learned[0] - 1, -1):
        if row >= 0 and number == learned[row]:
            out[row] = ahead
            row -= 1
        ahead = np.where(used[number], 1, np.minimum(ahead + 1, horizon))
    return out / horizon


def train(features: Array, reuse: Array, hidden: int, updates: int, rng: np.random.Generator) -> Networks:
    """Networks that predict ``reuse`` [L, n] from ``features`` [L, n, F], by ``updates`` steps of Adam.

    Each is on 1,024 examples, the same places in every layer; the step size falls from 0.01 to 0. Source: Kingma and
    Ba, *Adam*, ICLR 2015.
    """
    layers, count, width = features.shape
    weights = [
        rng.normal(size=(layers, width, hidden)) * np.sqrt(2.0 / width),
        rng.uniform(-0.5, 0.5, size=(layers, hidden)),
        rng.normal(size=(layers, hidden)) / np.sqrt(hidden),
        reuse.mean(axis=1),
    ]
    moments = [(np.zeros_like(weight), np.zeros_like(weight)) for weight in weights]
    for update in range(1, updates + 1):
        batch = rng.integers(count, size=1024)
        slopes = _slopes(Networks(*weights), features[:, batch], reuse[:, batch])
        rate = 0.01 * (1.0 - (update - 1) / updates) * np.sqrt(1.0 - 0.999**update) / (1.0 - 0.9**update)
        for weight, slope, (mean, square) in zip(weights, slopes, moments, strict=True):
            mean += 0.1 * (slope - mean)
            square += 0.001 * (slope * slope - square)
            weight -= rate * mean / (np.sqrt(square) + 1e-8)
    return Networks(*weights)


def _slopes(networks: Networks, features: Array, reuse: Array) -> Networks:
    """Gradients of half the mean squared error of every layer's network."""
    level = features @ networks.into + networks.bias[:, None]  # [L, n, H]
    active = np.maximum(level, 0.0)
    error = ((active @ networks.out[:, :, None])[:, :, 0] + networks.out_bias[:, None] - reuse) / reuse.shape[1]
    back = error[:, :, None] * networks.out[:, None] * (level > 0.0)  # [L, n, H]
    return Networks(
        into=features.transpose(0, 2, 1) @ back,
        bias=back.sum(axis=1),
        out=(error[:, None] @ active)[:, 0],
        out_bias=error.sum(axis=1),
    )
