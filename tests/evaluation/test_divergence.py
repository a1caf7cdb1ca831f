"""Where continuations part, how long they are, and whether a pass key is found."""

import pytest
import torch

from elastickv.errors import UsageError
from elastickv.evaluation.generations.divergence import divergence
from elastickv.evaluation.needle import answered, cases
from elastickv.evaluation.prefill import Prefill
from elastickv.evaluation.suggestion import Tolerance, suggest
from tests.helpers.tiny_models import CharacterTokenizer

TOKENIZER = CharacterTokenizer(1 << 20)
HAY = "hay " * 500


def test_continuations_part_at_the_first_token_that_differs():
    full = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 9, 1, 1]])
    generated = torch.tensor([[5, 6, 7, 8], [5, 4, 7, 8], [5, 1, 9, 9]])
    result = divergence(full, generated, {9})
    assert result.first_different == (4, 1, 1) and result.same_rows == 1
    # Texts end at 9: 4 + 4 + 3 tokens against 4 + 4 + 2.
    assert result.length_ratio == pytest.approx(11 / 10)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_case_has_its_length_and_hides_its_key_at_its_depth(depth):
    (case,) = cases(TOKENIZER, HAY, 900, [depth])
    text = TOKENIZER.decode(case.ids)
    assert len(case.ids) == 900 and text.count(case.key) == 1 and len(case.key) == 5
    opening, _, rest = text.partition("afterwards.\n")
    assert opening.startswith("A special magic number is hidden") and rest.endswith("in the provided text is")
    before, after = rest.split(f" One of the special magic numbers for pass-key is: {case.key}. ")
    hay = after.partition("\nWhat is the special magic number")[0]
    assert len(before) == pytest.approx(depth * len(before + hay), abs=1) and (before + hay) == HAY[: len(before + hay)]


def test_a_chat_template_takes_the_prompt_and_the_length_stays():
    tokenizer = CharacterTokenizer(1 << 20)
    tokenizer.chat_template = "a template"
    tokenizer.apply_chat_template = lambda chat, **_: f"[user]{chat[0]['content']}[assistant]"
    (case,) = cases(tokenizer, HAY, 900, [0.5])
    text = tokenizer.decode(case.ids)
    assert len(case.ids) == 900 and text.startswith("[user]A special magic number is hidden")
    assert text.endswith("[assistant]The special magic number for pass-key mentioned in the provided text is")


def test_keys_differ_between_cases_and_are_the_same_in_every_run():
    prompts = cases(TOKENIZER, HAY, 900, [0.0, 0.5, 1.0])
    assert len({case.key for case in prompts}) == 3
    assert prompts == cases(TOKENIZER, HAY, 900, [0.0, 0.5, 1.0])


@pytest.mark.parametrize(("length", "named"), [(50, "at least"), (5000, "needs a text of")])
def test_a_length_that_does_not_fit_is_refused(length, named):
    with pytest.raises(UsageError, match=named):
        cases(TOKENIZER, HAY, length, [0.5])


class Saying:
    """A session whose rows spell out given texts."""

    def __init__(self, texts):
        self.texts, self.number = texts, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self, ids):
        letters = [text[self.number] if self.number < len(text) else "." for text in self.texts]
        self.number += 1
        return torch.nn.functional.one_hot(torch.tensor([ord(c) for c in letters]), 128).float()


def test_an_answer_counts_if_the_key_comes_first():
    rows = cases(TOKENIZER, HAY, 900, [0.0, 0.5, 1.0])
    said = [f" {rows[0].key}. And", f" not {rows[1].key}", f" {rows[2].key[:4]}0"]
    assert answered(rows, Prefill([], [], torch.zeros(3, 0, 128)), lambda *_: Saying(said), TOKENIZER) == [True, False, False]
    longer = [f" {rows[0].key}6", f'\n"{rows[1].key}"', f"**{rows[2].key}**"]
    assert answered(rows, Prefill([], [], torch.zeros(3, 0, 128)), lambda *_: Saying(longer), TOKENIZER) == [False, True, True]


def row(compress, mean, high=None):
    return {"compress": compress, "ppl_change_percent": {"mean": mean, "low": 0.0, "high": high or mean}}


def test_the_largest_ratio_within_the_tolerance_at_every_context_is_suggested():
    tolerance = Tolerance.parse("ppl=0.5%")
    rows = [row(1, 0), row(2, 0.1), row(4, 0.3), row(4, 0.4, 0.6), row(8, 2), row(None, 0.01)]
    assert suggest(rows, tolerance) == {"tolerance": "ppl=0.5%", "compress": 4, "certain": False}
    assert suggest(rows[:3], tolerance) == {"tolerance": "ppl=0.5%", "compress": 4, "certain": True}
    assert suggest([*rows, row(2, 0.7)], tolerance)["compress"] == 1
    assert suggest([row(2, 0.7)], tolerance)["compress"] is None


def test_agreement_is_bounded_from_below():
    tolerance = Tolerance.parse("top1=96%")
    rows = [{"compress": 4, "top1_percent": {"mean": 97.0, "low": 95.0, "high": 98.0}}]
    assert suggest(rows, tolerance) == {"tolerance": "top1=96%", "compress": 4, "certain": False}


@pytest.mark.parametrize("text", ["ppl", "ppl=", "ppl<1", "loss=1", "kl=1%", "ppl=-1%", "ppl=1e9999x"])
def test_what_is_no_tolerance_is_refused(text):
    with pytest.raises(UsageError, match=r"write ppl=0\.5%"):
        Tolerance.parse(text)
