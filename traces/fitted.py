"""Synthetic routing in the manner of a recorded trace, at any model's dimensions.

A token has a hidden vector, and a layer chooses the K experts that fit it best: fit = direction * vector + bias. The
vector is a sum of independent normal parts, of variance 1 together: one that all tokens of a domain share, one that
tokens at the same place of its sequences share, one that a sequence shares, some that last for a window of its tokens,
and one of the token's own. From layer to layer the vector drifts. In each layer an expert has a random direction, and
a bias that makes it popular or not. So the same vector decides in all layers, and a model of other dimensions has more
directions for the same vectors. How large the parts are is a :class:`Law`, which :func:`traces.fit.fit`
reads from a trace.

Shapes: T rows, L layers, K experts a token, E experts, R the rank rounded up, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from traces.memory import check_free
from traces.schema import NOT_ROUTED, Array, LookaheadRouter, Trace, TraceHeader, WeightDtype
from traces.synthetic import Shape, rows_of, winners, within

SMALLEST_SCORE = 1e-6
"""What was chosen keeps at least this score: float16 would make less of it, and less than that 0."""
SAMPLE_ROWS = 512
"""Rows of a layer on which the noise of its predictions is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """How the routing of a trace is distributed, in terms that models of all dimensions share.

    ``domain``, ``place``, ``sequence`` and ``windows``, pairs of (tokens, share), are shares of the variance of a
    hidden vector; what they leave is the token's own. The first ``opening`` tokens are the same in all sequences, the
    first ``domain_opening`` in all of a domain, as templates make them. ``bias`` are biases at equal steps of
    popularity, the most popular first. ``rank`` is the number of dimensions of the vector, the last of which may count
    for a fraction; ``drift`` is the correlation of the vector between one layer and the next. Scores are the softmax
    of ``sharpness`` times the fit; gates are those of the chosen experts, over their sum if ``renormalised``.
    ``lookahead_recall`` is the share of experts that predictions 1, 2, ... layers ahead have right, made by
    ``lookahead_router`` in the source. ``domains`` has the domain of each sequence of the source, or nothing.
    """

    source: str
    source_digest: str
    bias: tuple[float, ...]
    domain: float = 0.0
    place: float = 0.0
    sequence: float = 0.0
    windows: tuple[tuple[int, float], ...] = ()
    opening: int = 0
    domain_opening: int = 0
    rank: float = 8.0
    drift: float = 1.0
    sharpness: float = 1.0
    renormalised: bool = True
    scores: bool = False
    lookahead_recall: tuple[float, ...] = ()
    lookahead_router: LookaheadRouter = "plain"
    domains: tuple[str, ...] = ()

    def bias_of(self, experts: int) -> Array:
        """The biases of ``experts`` experts, the most popular first: float64 [E]."""
        steps = len(self.bias)
        places = (np.arange(experts) + 0.5) / experts
        biases: Array = np.interp(places, (np.arange(steps) + 0.5) / steps, self.bias)
        return biases

    def domains_of(self, sequences: int) -> tuple[str, ...]:
        """Domains of ``sequences`` sequences, in the order and the proportions of the source."""
        if not self.domains:
            return ()
        return tuple(self.domains[place * len(self.domains) // sequences] for place in range(sequences))

    def told(self) -> str:
        """The law in one line, for a header; what other fields of it say is left out."""
        elsewhere = ("source", "domains", "lookahead_router")
        own = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        return ", ".join(f"{name}={value}" for name, value in own.items())


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """Which rows, one sequence after the other, belong together."""

    starts: Array  # int64 [S], the first row of each sequence
    rows: int
    domain: Array  # int64 [S], number of each sequence's domain

    def of_row(self) -> Array:
        """The number of the sequence of each row, int64 [T]."""
        return np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=self.rows))

    def models(self, opening: int, domain_opening: int) -> Array:
        """The row whose vector each row takes, int64 [T]: its own, or in an opening that of the first sequence.

        ``opening`` tokens are those of the first sequence of all, ``domain_opening`` those of the first of the domain.
        """
        lane, own = self.of_row(), np.arange(self.rows)
        place = own - self.starts[lane]
        _, first = np.unique(self.domain, return_index=True)
        length = np.diff(self.starts, append=self.rows)
        model = own
        for tokens, like in (
            (domain_opening, first[self.domain[lane]]),
            (opening, np.zeros(self.rows, dtype=np.int64)),
        ):
            model = np.where((place < tokens) & (place < length[like]), self.starts[like] + place, model)
        return model


def generate(law: Law, seed: int, shape: Shape, *, dtype: WeightDtype = "float32") -> Trace:
    """A trace of ``shape`` that follows ``law``, marked as synthetic; ``dtype`` is for its header.

    Raises :class:`InputError` for a seed below 0, and when the host's free memory would not hold the trace while it
    is made.
    """
    within("seed", seed, 0)
    _check_memory(law, shape)
    domains = law.domains_of(shape.sequences)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(domains))}
    domain = np.array([numbers[name] for name in domains] or [0] * shape.sequences)
    lanes = Lanes(np.arange(shape.sequences) * shape.tokens, shape.sequences * shape.tokens, domain)
    header = TraceHeader(
        model="fitted",
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_bytes=shape.layer_bytes,
        dtype=dtype,
        made_by=f"fitted(seed={seed}, sequences={shape.sequences}, prompt_tokens={shape.prompt_tokens}, "
        f"new_tokens={shape.new_tokens}) like {law.source}: {law.told()}",
        synthetic=True,
        domains=domains,
        software={"numpy": np.__version__},
        lookahead_router=law.lookahead_router,
    )
    arrays = routed(law, np.random.default_rng(seed), lanes, header)
    return Trace.of(header, token_ids=np.zeros(lanes.rows), **rows_of(shape), **arrays)


def _check_memory(law: Law, shape: Shape) -> None:
    """Raises :class:`InputError` when the free memory is less than about the peak of making a trace."""
    rows, depth = shape.sequences * shape.tokens, len(law.lookahead_recall)
    stored = shape.layers * (shape.top_k * (8 + 4 * depth) + 4 * shape.experts * law.scores)
    at_work = 40 * shape.experts + 40 * int(np.ceil(law.rank))
    needed = rows * (stored + at_work)
    check_free(
        needed,
        "sequences x tokens x layers",
        f"{shape.sequences} x {shape.tokens} x {shape.layers}, which take about {needed / 1e9:.1f} GB",
    )


def routed(law: Law, rng: np.random.Generator, lanes: Lanes, header: TraceHeader) -> dict[str, Array]:
    """What the layers of ``header`` choose for the rows of ``lanes``: the arrays of a trace, from expert_ids on."""
    depth = min(len(law.lookahead_recall), header.layers - 1)
    route_rng, ahead_rng = rng.spawn(2)
    choices = (lanes.rows, header.layers, header.top_k)
    arrays = {"expert_ids": np.empty(choices, np.uint16), "gates": np.empty(choices, np.float16)}
    if law.scores:
        arrays["scores"] = np.empty((*choices[:2], header.experts), np.float16)
    if depth:
        arrays["lookahead"] = np.full((*choices[:2], depth, header.top_k), NOT_ROUTED, np.uint16)
    for layer, fits in enumerate(layer_fits(law, route_rng, lanes, header.layers, header.experts)):
        ids = winners(-fits, header.top_k)
        arrays["expert_ids"][:, layer] = ids
        scores = softmax(law.sharpness * fits)
        arrays["gates"][:, layer] = gates_of(law, scores, ids)
        if law.scores:
            arrays["scores"][:, layer] = _stored(scores, ids)
        for ahead in range(1, min(depth, layer) + 1):
            found = _predicted(ahead_rng, fits, ids, law.lookahead_recall[ahead - 1])
            arrays["lookahead"][:, layer - ahead, ahead - 1] = found
    return arrays


def layer_fits(law: Law, rng: np.random.Generator, lanes: Lanes, layers: int, experts: int) -> Iterator[Array]:
    """Yields how well every expert of a layer fits every row, layer by layer: float64 [T, E]."""
    vector, model = _vectors(law, rng, lanes), lanes.models(law.opening, law.domain_opening)
    for layer in range(layers):
        if layer and law.drift < 1:
            vector = law.drift * vector + np.sqrt(1 - law.drift**2) * _vectors(law, rng, lanes)
        yield fits_of(vector[model], directions(rng, experts, law.rank)) + rng.permutation(law.bias_of(experts))


def fits_of(vectors: Array, toward: Array) -> Array:
    """How well directions [E, R] fit vectors [T, R]: float64 [T, E].

    A loop over the few dimensions: a library's product of matrices may round differently with each number of threads.
    """
    fits = np.zeros((len(vectors), len(toward)))
    for one, other in zip(vectors.T, toward.T, strict=True):
        fits += one[:, None] * other
    return fits


def directions(rng: np.random.Generator, experts: int, rank: float) -> Array:
    """Random directions of length 1, float64 [E, R]: the dimension that is a fraction counts for as much less."""
    drawn = _spread(rng, experts, int(np.ceil(rank)))
    drawn[:, -1] *= np.sqrt(rank - np.ceil(rank) + 1)
    unit: Array = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


def _vectors(law: Law, rng: np.random.Generator, lanes: Lanes) -> Array:
    """New hidden vectors of variance 1 in each dimension, float64 [T, R]."""
    rank, lane = int(np.ceil(law.rank)), lanes.of_row()
    own = 1 - law.domain - law.place - law.sequence - sum(share for _, share in law.windows)
    vectors: Array = np.sqrt(max(own, 0.0)) * rng.standard_normal((lanes.rows, rank))
    vectors += np.sqrt(law.domain) * _spread(rng, int(lanes.domain.max()) + 1, rank)[lanes.domain[lane]]
    vectors += np.sqrt(law.place) * _of_places(rng, lanes, rank)
    vectors += np.sqrt(law.sequence) * _spread(rng, len(lanes.starts), rank)[lane]
    for tokens, share in law.windows:
        vectors += np.sqrt(share) * _windows(rng, lanes, rank, tokens)
    return vectors


def _of_places(rng: np.random.Generator, lanes: Lanes, rank: int) -> Array:
    """Vectors [T, R] that rows at the same place of the sequences of one domain share."""
    lane = lanes.of_row()
    place = np.arange(lanes.rows) - lanes.starts[lane]
    drawn: Array = rng.standard_normal((int(lanes.domain.max()) + 1, int(place.max()) + 1, rank))
    return drawn[lanes.domain[lane], place]


def _spread(rng: np.random.Generator, count: int, rank: int) -> Array:
    """Random vectors [count, R] of length sqrt(R), each R of them in turn at right angles to one another.

    A handful of independent ones would lean to one side together, and the popularity of experts with them.
    """
    turns, triangles = np.linalg.qr(rng.standard_normal((-(-count // rank), rank, rank)))
    turns *= np.sign(np.diagonal(triangles, axis1=1, axis2=2))[
        :, None
    ]  # no direction is preferred then (Mezzadri 2007)
    vectors: Array = np.sqrt(rank) * turns.reshape(-1, rank)[:count]
    return vectors


def _windows(rng: np.random.Generator, lanes: Lanes, rank: int, tokens: int) -> Array:
    """Vectors [T, R] of variance 1 that are sums over the last ``tokens`` draws of the sequence."""
    lengths = np.diff(lanes.starts, append=lanes.rows)
    vectors = np.empty((lanes.rows, rank))
    for start, length in zip(lanes.starts, lengths, strict=True):
        total = np.cumsum(rng.standard_normal((length + tokens, rank)), axis=0)
        vectors[start : start + length] = (total[tokens:] - total[:-tokens]) / np.sqrt(tokens)
    return vectors


def gates_of(law: Law, scores: Array, ids: Array) -> Array:
    """The chosen experts' gates, float64 [T, K], of scores [T, E]."""
    gates: Array = np.take_along_axis(scores, ids, axis=-1)
    if law.renormalised:
        gates /= gates.sum(axis=-1, keepdims=True)
    return gates


def softmax(logits: Array) -> Array:
    """Scores of sum 1 along the last axis."""
    powers: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def _stored(scores: Array, ids: Array) -> Array:
    """``scores`` in float16, where rounding has made no other expert the equal of a chosen one."""
    chosen = np.maximum(np.take_along_axis(scores, ids, axis=-1), SMALLEST_SCORE).astype(np.float16)
    below = np.nextafter(chosen[:, -1:], np.float16(0))
    stored: Array = np.minimum(scores.astype(np.float16), below)
    np.put_along_axis(stored, ids, chosen, axis=-1)
    return stored


def _predicted(rng: np.random.Generator, fits: Array, ids: Array, recall: float) -> Array:
    """Experts [T, K] that a noisy look at ``fits`` chooses; the noise is such that ``recall`` of ``ids`` are there.

    No noise at all makes it 1; a recall below K / E cannot be had, and gives that of chance.
    """
    noise = rng.standard_normal(fits.shape)
    sample = slice(None, None, -(-len(fits) // SAMPLE_ROWS))
    low, high = 0.0, 1.0
    for _ in range(12 if recall < 1 else 0):
        share = (low + high) / 2
        found = winners(-_noisy(fits[sample], noise[sample], share), ids.shape[1])
        right = (found[:, :, None] == ids[sample][:, None, :]).any(axis=-1).mean()
        low, high = (share, high) if right > recall else (low, share)
    return winners(-_noisy(fits, noise, low), ids.shape[1])


def _noisy(fits: Array, noise: Array, share: float) -> Array:
    mixed: Array = (1 - share) * fits + share * noise
    return mixed
