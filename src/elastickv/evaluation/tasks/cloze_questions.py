"""Questions over the shipped texts: a sentence of one of many documents with a word left out.

RULER's `qa` asks SQuAD's and HotpotQA's questions about one document among others (Hsieh et al. 2024, `qa.py`). These are cloze
questions (Taylor 1953; Hermann et al. 2015) in its prompt, so that nothing is downloaded and every answer can be checked: the
sentence stands in exactly one document, and the word once in all of them, not even as a part of another word.
"""

import random
import re
from collections import Counter
from functools import cache

from elastickv.evaluation.tasks.shipped_material import Material, sentences_of
from elastickv.evaluation.tasks.synthetic_task import RULER, Draft, Size, SyntheticTask, Wording

_BLANK = "_____"
_SENTENCE_WORDS = range(10, 41)
_LEAST_LETTERS = 5
_WORDS = re.compile(r"[A-Za-z]+")


class ClozeQuestions(SyntheticTask):
    """Paragraphs as documents, and a sentence of one of them without a word."""

    name = "qa_cloze"
    source = f"after qa of {RULER}, cloze questions over the shipped texts"
    metric = "part"
    answer_tokens = 32
    wordings = (
        Wording(
            "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
            "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give "
            "me the answer and do not output any other words.\n\nQuestion: Which word is missing in this sentence of the "
            'documents? "{query}"',
            " Answer: The missing word is",
        ),
        Wording(
            "Below are some documents. Use them to answer the question that follows, with a single word.\n\n{context}\n\n"
            "Use the documents above to answer with a single word.\n\nQuestion: One of the documents contains this sentence "
            'with another word in place of the blank: "{query}" Which word is it?',
            " Answer: The word in place of the blank is",
        ),
    )

    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Take the next question, and draw `units` documents with the one that answers it among them."""
        questions = cloze_questions(material)
        number, sentence, word = questions[size.number % len(questions)]
        order = [other for other in range(len(material.paragraphs)) if other != number]
        rng.shuffle(order)
        place = rng.random()
        # More documents than there are begin anew, without the one that answers.
        others = [order[i % len(order)] for i in range(size.units - 1)]
        documents = [*others[: round(place * len(others))], number, *others[round(place * len(others)) :]]
        context = "\n\n".join(f"Document {i}:\n{material.paragraphs[chosen]}" for i, chosen in enumerate(documents, 1))
        return Draft(context, {"query": sentence.replace(word, _BLANK)}, (word,))


@cache
def cloze_questions(material: Material) -> list[tuple[int, str, str]]:
    """Return (number of a paragraph, a sentence of it, the word to leave out) for every sentence with such a word, shuffled."""
    whole = "\n".join(material.paragraphs).lower()
    counts = Counter(_WORDS.findall(whole))
    questions = []
    for number, paragraph in enumerate(material.paragraphs):
        for sentence in sentences_of(paragraph):
            words = _WORDS.findall(sentence)
            if len(words) not in _SENTENCE_WORDS:
                continue
            rare = [
                word
                for word in words[1:]
                if len(word) >= _LEAST_LETTERS and counts[word.lower()] == 1 and whole.count(word.lower()) == 1
            ]
            if rare:
                questions.append((number, sentence, max(rare, key=len)))
    random.Random(0).shuffle(questions)
    return questions


CLOZE_QUESTIONS = ClozeQuestions()
