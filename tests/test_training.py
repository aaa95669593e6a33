"""The small model's workshop: token streams, training passes, training, figures and card."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from real.models import corpus as corpora
from real.models import evaluate as measures
from real.models.card import render_card
from real.models.kernels import SortedExperts, training_forward
from real.models.optimiser import orthogonalise
from real.models.tokens import SequenceSampler, train_tokenizer, training_stream
from real.models.train import app, publish, train_model
from real.models.trainer import Recipe, Trainer, expert_loads, make_model, rate_factor, router_losses, run_training
from traces.errors import InputError

SUBJECTS = ("the miller", "a ferryman", "our neighbour", "the old clerk", "her sister", "a tall sailor")
VERBS = ("carries", "sells", "repairs", "counts", "forgets", "paints")
OBJECTS = ("two lanterns", "the heavy door", "a basket of pears", "seven letters", "the blue boat", "an empty jar")

TOY = Recipe(
    steps=24,
    layers=2,
    hidden=32,
    experts=8,
    top_k=2,
    expert_width=16,
    heads=2,
    kv_heads=1,
    head_dim=16,
    vocab_size=320,
    max_positions=128,
    sequence_length=32,
    batch_size=8,
    number_format="float32",
)


def sentences(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    words = ([str(rng.choice(part)) for part in (SUBJECTS, VERBS, OBJECTS)] for _ in range(count))
    return " ".join(f"{a} {b} {c}.".capitalize() for a, b, c in words) + "\n"


def sums(seed: int, count: int) -> str:
    pairs = np.random.default_rng(seed).integers(1, 50, size=(count, 2)).tolist()
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs) + "\n"


@pytest.fixture(scope="module")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "toy"
    domains = {
        "prose": [(f"p{i}", sentences(i, 12)) for i in range(20)],
        "arithmetic": [(f"a{i}", sums(i, 30)) for i in range(20)],
    }
    source = {"kind": "own", "package": "toy", "version": "1", "licence": "Apache-2.0", "sha256": "none"}
    corpora.write_corpus(folder, domains, [source | {"domain": name} for name in domains], seed=1)
    return corpora.load_corpus(folder)


@pytest.fixture(scope="module")
def tokenizer(toy_corpus: corpora.Corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer((text for texts in toy_corpus.train.values() for text in texts), TOY.vocab_size, 128)


@pytest.fixture
def trainer(toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast) -> Trainer:
    return make_trainer(toy_corpus, tokenizer, TOY)


def make_trainer(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, workers: int = 1
) -> Trainer:
    stream = training_stream(tokenizer, toy_corpus.train, recipe.seed)
    sampler = SequenceSampler(stream, recipe.sequence_length, recipe.batch_size, recipe.seed)
    return Trainer(recipe, make_model(recipe, tokenizer), sampler, workers)


def weights_of(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().ravel() for weight in trainer.model.parameters()])


def test_tokenizer_encodes_any_text_and_puts_bos_first(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Žluťoučký kůň\n\tx = {1: '☃'}"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sampler_visits_every_sequence_once_an_epoch_and_is_a_function_of_the_step() -> None:
    stream = np.arange(10_001)
    sampler = SequenceSampler(stream, length=10, batch_size=37, seed=4)
    assert sampler.count % 37 == 0
    steps = sampler.count // 37
    seen = np.concatenate([sampler.batch(step)[:, 0] for step in range(steps)])
    assert len(np.unique(seen)) == sampler.count
    again = SequenceSampler(stream, length=10, batch_size=37, seed=4)
    assert np.array_equal(again.batch(steps + 2), sampler.batch(steps + 2))
    assert not np.array_equal(sampler.batch(0), sampler.batch(steps))


def test_sampler_needs_a_batch_of_sequences() -> None:
    with pytest.raises(ValueError, match="stream must hold at least"):
        SequenceSampler(np.arange(100), length=32, batch_size=8, seed=0)


def test_training_forward_equals_the_transformers_model(trainer: Trainer) -> None:
    torch.manual_seed(0)
    batch = torch.randint(3, TOY.vocab_size, (2, 151))
    model = trainer.model
    output = model(input_ids=batch[:, :-1], output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    loss, logits = training_forward(model, batch[:, :-1], batch[:, 1:], torch.float32)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits[1], output.router_logits[1])
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_sorted_experts_leave_unused_experts_without_gradient() -> None:
    torch.manual_seed(1)
    gate_up, down = torch.randn(4, 12, 8, requires_grad=True), torch.randn(4, 8, 6, requires_grad=True)
    x, index, weight = torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5)
    out = SortedExperts.apply(x, index, weight, gate_up, down)
    out.sum().backward()
    assert gate_up.grad is not None
    assert down.grad is not None
    assert not gate_up.grad[[1, 3]].any()
    assert down.grad[[0, 2]].any()


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(2)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 32)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_router_losses_are_one_when_even_and_grow_when_not() -> None:
    even = torch.eye(4).repeat(8, 1) * 5.0
    uneven = torch.zeros(32, 4)
    uneven[:, 0] = 5.0
    assert router_losses([even, even], expert_loads([even, even], 1))[0].item() == pytest.approx(2.0)
    assert router_losses([uneven], expert_loads([uneven], 1))[0].item() > 3.5


def test_rate_warms_up_and_ends_at_zero() -> None:
    assert rate_factor(0.0, TOY) < rate_factor(0.01, TOY) < rate_factor(0.1, TOY) == 1.0
    assert rate_factor(0.9, TOY) == pytest.approx(0.1 / 0.7)
    assert rate_factor(1.0, TOY) == 0.0


def test_the_loss_falls_and_the_result_is_an_ordinary_checkpoint(toy_corpus: corpora.Corpus, tmp_path: Path) -> None:
    figures = train_model(TOY, toy_corpus, tmp_path / "toy", tmp_path / "work")
    evaluation = figures["evaluation"]
    assert figures["run"]["last_training_loss"] < np.log(TOY.vocab_size) - 1.0
    assert evaluation["overall"]["loss"] < np.log(TOY.vocab_size) - 1.0
    assert evaluation["domains"].keys() == {"arithmetic", "prose"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "toy")("The miller", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], TOY.vocab_size)
    assert json.loads((tmp_path / "toy" / "training.json").read_text()) == figures
    assert (tmp_path / "toy" / "README.md").read_text() == render_card(figures)


def test_the_same_seed_gives_the_same_weights(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast, trainer: Trainer
) -> None:
    other = make_trainer(toy_corpus, tokenizer, TOY)
    for run in (trainer, other):
        for _ in range(4):
            run.step()
    assert torch.equal(weights_of(trainer), weights_of(other))


def test_workers_share_a_batch_and_balance_it_as_a_whole(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast, trainer: Trainer
) -> None:
    pair = make_trainer(toy_corpus, tokenizer, TOY, workers=2)
    pair.warm_up()
    for run in (trainer, pair):
        run.step()
    assert pair.progressed.loss == pytest.approx(trainer.progressed.loss, rel=1e-5)
    assert pair.progressed.balance == pytest.approx(trainer.progressed.balance, rel=1e-5)
    for one, two in zip(trainer.parameters, pair.parameters, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-6)


def test_a_failing_worker_does_not_leave_the_other_waiting(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = make_trainer(toy_corpus, tokenizer, TOY, workers=2)
    batch = torch.from_numpy(pair.sampler.batch(0))
    batch[-1] = TOY.vocab_size + 7
    with pytest.raises((IndexError, threading.BrokenBarrierError)):
        pair._fill_gradients(batch)


def test_workers_must_divide_the_batch(toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="workers must divide batch_size 8, got 3"):
        make_trainer(toy_corpus, tokenizer, TOY, workers=3)


def test_a_resumed_run_goes_on_exactly(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast, trainer: Trainer, tmp_path: Path
) -> None:
    for _ in range(3):
        trainer.step()
    trainer.save_state(tmp_path / "state.pt")
    for _ in range(3):
        trainer.step()
    resumed = make_trainer(toy_corpus, tokenizer, TOY)
    resumed.load_state(tmp_path / "state.pt")
    for _ in range(3):
        resumed.step()
    assert resumed.progressed.step == 6
    assert torch.equal(weights_of(trainer), weights_of(resumed))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_resuming_with_another_recipe_is_refused(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast, trainer: Trainer, tmp_path: Path
) -> None:
    trainer.save_state(tmp_path / "state.pt")
    other = make_trainer(toy_corpus, tokenizer, Recipe(**{**vars(TOY), "batch_size": 4}))
    with pytest.raises(ValueError, match="batch_size must equal the saved run's 8, got 4"):
        other.load_state(tmp_path / "state.pt")


def test_training_keeps_a_log_and_a_state_and_ends_with_its_budget(trainer: Trainer, tmp_path: Path) -> None:
    run_training(trainer, tmp_path, save_every_s=0.0, log_every=8)
    lines = [json.loads(line) for line in (tmp_path / "training-log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 16, 24]
    assert (tmp_path / "training-state.pt").exists()
    assert trainer.share_done() == 1.0


def test_a_folder_that_holds_files_is_left_alone_unless_forced(toy_corpus: corpora.Corpus, tmp_path: Path) -> None:
    out, work = tmp_path / "model", tmp_path / "work"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="out must be an empty or new folder"):
        train_model(TOY, toy_corpus, out, work)
    assert not work.exists()
    refused = CliRunner().invoke(app, ["--out", str(out), "--steps", "1"])
    assert refused.exit_code == 2
    assert refused.output.startswith("error: out must be an empty or new folder (or give --force)")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "thesis.txt"]


def test_a_forced_model_replaces_its_own_files_only(
    toy_corpus: corpora.Corpus, tokenizer: PreTrainedTokenizerFast, trainer: Trainer, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "README.md").write_text("an older card")
    trainer.step()
    stream = training_stream(tokenizer, toy_corpus.train, TOY.seed)
    figures = publish(trainer, tokenizer, toy_corpus, stream, tmp_path, "command", force=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == render_card(figures)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_corpus_is_not_built_into_a_folder_of_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real.models.train.build_corpus", pytest.fail)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").write_text("mine")
    command = ["--out", str(tmp_path / "model"), "--corpus", str(tmp_path / "texts"), "--workers", "1"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert refused.output.startswith("error: out must be an empty or new folder")
    assert (tmp_path / "texts" / "thesis.txt").read_text() == "mine"


def test_the_command_line_explains_itself_and_refuses_a_budget_of_nothing(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "Examples" in runner.invoke(app, ["--help"]).output
    refused = runner.invoke(app, ["--out", str(tmp_path / "x"), "--minutes", "0"])
    assert refused.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_ngram_probabilities_sum_to_one_in_every_context() -> None:
    stream = np.array([0, 1, 2, 1, 2, 3, 1, 2, 1, 0, 3])
    baseline = measures.TrigramModel(stream, vocab_size=5)
    assert baseline.unigram(np.arange(5)).sum() == pytest.approx(1.0)
    for context in ([1, 2], [2, 4], [4, 4], [0, 3]):
        total = sum(baseline.trigram(np.array([*context, c]))[0] for c in range(5))
        assert total == pytest.approx(1.0)


def test_trigram_follows_the_formula() -> None:
    baseline = measures.TrigramModel(np.array([0, 1, 2, 0, 1, 2]), vocab_size=3)
    unigram = (2 + 1) / (6 + 3)
    bigram = (2 + 1 * unigram) / (2 + 1)  # after 1 always 2
    assert baseline.trigram(np.array([0, 1, 2]))[0] == pytest.approx((2 + 1 * bigram) / (2 + 1))


def test_lru_looks_up_all_experts_of_a_token_before_it_admits_any() -> None:
    choices = np.array([[0, 1], [1, 2], [0, 3], [2, 3]])
    # the cache holds 2: {}, then {0, 1}, {1, 2}, {0, 3}; hits: none, 1, none, 3
    assert measures.lru_hit_ratio(choices, num_experts=4, slots=2) == pytest.approx(2 / 8)


def test_lru_evicts_the_lowest_id_among_equally_old() -> None:
    # {0, 1} then 2 comes with 1 evicted or 0 evicted: 0 is the lower id, so 1 stays and hits
    choices = np.array([[0, 1], [2, 3], [1, 2]])
    assert measures.lru_hit_ratio(choices, num_experts=4, slots=3) == pytest.approx(2 / 6)


def test_lru_needs_room_for_one_token() -> None:
    with pytest.raises(ValueError, match="slots must be at least k = 2, got 1"):
        measures.lru_hit_ratio(np.array([[0, 1]]), num_experts=4, slots=1)


def test_overlap_and_load_on_a_hand_made_sequence() -> None:
    choices = np.array([[0, 1], [1, 2], [3, 0]])
    assert measures.neighbour_overlap(choices) == pytest.approx(1 / 4)
    assert measures.load_ratio(choices, num_experts=4) == pytest.approx(2 / 1.5)
