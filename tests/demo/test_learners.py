"""How the architectures are asked to translate, and that they learn it: a few steps must lower the loss."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS, EncoderDecoderLearner
from moekernels.demo.numbers import LANGUAGES
from moekernels.demo.training import exact_matches, train
from moekernels.demo.usage import Usage, draw, expert_usage


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


def test_held_out_numbers_are_never_trained_on(corpus: Corpus) -> None:
    held_out = {LANGUAGES["eng_Latn"](number) for number in corpus.held_out}
    assert len(held_out) == 500 and not held_out & set(corpus.texts())
    for batch in islice(corpus.batches(64), 20):
        assert not held_out & {pair.source for pair in batch} and len({pair.source_language for pair in batch}) == 3
    assert len(corpus.held_out_pairs()) == 500 * 6


@pytest.mark.parametrize("name", LEARNERS)
def test_learns_saves_and_loads(name: str, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    learner = LEARNERS[name].create(corpus)
    losses = list(train(learner, corpus, num_steps=15, batch_size=16))
    assert losses[-1] < 0.85 * losses[0] and not learner.model.training

    pairs = corpus.held_out_pairs()[:6]
    batch = learner.batch(pairs)
    targets = [[int(i) for i in row if i >= 0] for row in batch["labels"]]
    texts = learner.tokenizer.batch_decode(targets, skip_special_tokens=True)
    assert [text.strip() for text in texts] == [pair.target for pair in pairs]
    if not isinstance(learner, EncoderDecoderLearner):
        # What is learned follows the prompt, which is not.
        first = [int((row >= 0).nonzero()[0]) for row in batch["labels"]]
        assert first == [len(learner.prompt_ids(pair)) for pair in pairs]

    learner.save(tmp_path)
    again = LEARNERS[name].load(tmp_path)
    assert torch.equal(again.model(**again.batch(pairs)).logits, learner.model(**batch).logits)
    assert again.translate(pairs, num_beams=2) == learner.translate(pairs, num_beams=2)


@pytest.mark.parametrize("num_steps", [1, 10])
def test_any_number_of_steps(num_steps: int, corpus: Corpus) -> None:
    learner = LEARNERS["switch"].create(corpus)
    assert len(list(train(learner, corpus, num_steps=num_steps, batch_size=2))) == num_steps


def test_exact_matches_counts(corpus: Corpus) -> None:
    class Knowing:
        def translate(self, pairs: list, **options: object) -> list[str]:
            return [pair.target if pair.target_language != "fra_Latn" else "non" for pair in pairs]

    pairs = corpus.held_out_pairs()
    assert exact_matches(Knowing(), pairs) == len(pairs) * 2 // 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LEARNERS)
def test_usage(name: str, corpus: Corpus) -> None:
    torch.manual_seed(0)
    learner = LEARNERS[name].create(corpus)
    learner.model.eval()
    pairs = corpus.held_out_pairs()[:30]
    usage = expert_usage(learner, pairs, tuple(LANGUAGES))
    batch = learner.batch(pairs)
    choices = {"nllb-moe": 2, "switch": 1, "olmoe": 2, "phimoe": 2}[name]
    for layer, counts in usage.counts.items():
        labels = batch["labels"] >= 0
        tokens = labels.sum() if layer.startswith("decoder") else batch["attention_mask"].sum()
        assert counts.shape == (3, 8) and counts.sum() == choices * tokens, layer
        torch.testing.assert_close(usage.shares(layer).sum(1), torch.ones(3, dtype=torch.float64))
    assert usage.chosen == sum(int(counts.sum()) for counts in usage.counts.values())
    assert (usage.dropped > 0) <= (name in ("nllb-moe", "switch"))


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    usage = Usage(("eng_Latn", "fra_Latn"), {"encoder 0": torch.randint(1, 9, (2, 8))}, 100, 3)
    draw(usage, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
