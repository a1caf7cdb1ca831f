"""The load of `serving_soak.py`, and what is made of what it gave: no engine is needed for any of it."""

import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

SHARED_PREFIXES, SHARED, SEVERAL = 8, 0.4, 0.05  # prefixes; shares of requests with one, and with several answers
ABORTED = 0.02  # the probability that a step aborts a request
PHASE = 200  # steps with the same rate of arrivals
RATES = (0.05, 0.2, 0.2, 0.4, 1.0)  # requests a step
LONGEST_STEPS = 8  # that are listed


@dataclass
class SoakRequest:
    """A request of the load.

    Attributes
    ----------
    tokens : of an answer, which is sampled at temperature 1.
    """

    name: str
    prompt: list[int]
    tokens: int
    answers: int = 1


class Load:
    """Random arrivals and aborts: each step, a Poisson number of requests at a rate that changes every `PHASE` steps.

    Lengths of prompts are uniform in their logarithm, those of answers are uniform. Some prompts begin with a shared prefix.

    Parameters
    ----------
    vocabulary : tokens are below it.
    longest_prompt, longest_answer : tokens.
    """

    def __init__(self, vocabulary, longest_prompt, longest_answer, seed=0):
        self.rng = np.random.default_rng(seed)
        self.vocabulary, self.longest_prompt, self.longest_answer = vocabulary, longest_prompt, longest_answer
        self.prefixes = [self._tokens(int(self.rng.integers(1, longest_prompt // 2 + 1))) for _ in range(SHARED_PREFIXES)]
        self.count, self.rate = 0, 0.0

    def _tokens(self, count):
        return self.rng.integers(0, self.vocabulary, count).tolist()

    def arrivals(self, step, room):
        """Return the requests that arrive before a step: at most `room`."""
        if step % PHASE == 0:
            self.rate = float(self.rng.choice(RATES))
        return [self._request() for _ in range(min(room, self.rng.poisson(self.rate)))]

    def _request(self):
        self.count += 1
        prompt = self._tokens(round(float(np.exp(self.rng.uniform(0, np.log(self.longest_prompt))))))
        if self.rng.random() < SHARED:
            prompt = (self.prefixes[self.rng.integers(SHARED_PREFIXES)] + prompt)[: self.longest_prompt]
        answers = int(self.rng.integers(2, 5)) if self.rng.random() < SEVERAL else 1
        return SoakRequest(f"soak-{self.count}", prompt, int(self.rng.integers(1, self.longest_answer + 1)), answers)

    def aborted(self, running):
        """Return the name of the request that is aborted before a step, or None."""
        if not running or self.rng.random() >= ABORTED:
            return None
        return running[int(self.rng.integers(len(running)))]


@dataclass
class Sample:
    """A fair sample of a stream (Vitter 1985, algorithm R): all items that were offered are equally likely to be kept."""

    size: int
    rng: np.random.Generator
    items: list = field(default_factory=list)
    offered: int = 0

    def offer(self, item):
        self.offered += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := int(self.rng.integers(self.offered))) < self.size:
            self.items[place] = item


@dataclass(frozen=True)
class Step:
    """A step of the engine.

    Attributes
    ----------
    ms : from the end of the step before to its own end.
    requests, tokens : of the batch that it scheduled; 0 where there was nothing to schedule.
    decode : whether this batch and the one before only decode, and nothing arrived, ended or was aborted between them.
    """

    number: int
    ms: float
    requests: int
    tokens: int
    decode: bool


def step_times(steps, warm):
    """Return milliseconds of steps that only decode, of all steps, and of those of the warm-up, whose kernels are compiled."""
    settled = [step for step in steps if step.number >= warm and step.requests]
    return {
        "decode": _times([step for step in settled if step.decode]),
        "all": _times(settled),
        "warm_up": _times([step for step in steps if step.number < warm and step.requests]),
    }


def _times(steps):
    if not steps:
        return {"steps": 0}
    ms = [step.ms for step in steps]
    median, p99, p999 = (float(np.quantile(ms, q)) for q in (0.5, 0.99, 0.999))
    longest = sorted(steps, key=lambda step: -step.ms)[:LONGEST_STEPS]
    return {
        "steps": len(ms),
        "median_ms": median,
        "p99_ms": p99,
        "p999_ms": p999,
        "p999_over_median": p999 / median,
        "median_requests": statistics.median(step.requests for step in steps),
        "longest": [{"step": s.number, "ms": s.ms, "requests": s.requests, "tokens": s.tokens} for s in longest],
    }


@dataclass
class Checked:
    """A request of the soak, and the same request alone.

    Attributes
    ----------
    tokens, logprobs : of the answer in the soak; log-probabilities of its tokens.
    history : what happened to it: 'plain', 'prefix hit', 'preempted'.
    read, reread : log-probabilities of `tokens` when prompt and answer are read as one prompt, alone; the second time in
        smaller chunks.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    history: str
    read: list[float] = field(default_factory=list)
    reread: list[float] = field(default_factory=list)


def in_turns(checked):
    """Return requests so that those of different histories take turns: if time is short, some of each are checked."""
    by_history = defaultdict(list)
    for each in checked:
        by_history[each.history].append(each)
    return [each for turn in zip_longest(*by_history.values()) for each in turn if each is not None]


def agreement(checked):
    """Return how requests agree with themselves alone, over all and by their history."""
    by_history = {"all": checked} | {
        history: [each for each in checked if each.history == history] for history in sorted({c.history for c in checked})
    }
    return {history: _agreement(group) for history, group in by_history.items()}


def _agreement(checked):
    """Return how answers of the soak differ from the same tokens read alone, and these from themselves in smaller chunks."""
    return {
        "requests": len(checked),
        "soak": divergence([(each.logprobs, each.read) for each in checked]),
        "chunks": divergence([(each.reread, each.read) for each in checked]),
    }


def divergence(pairs):
    """Return the Kullback-Leibler divergence of two distributions, a token, and the log-probabilities' |differences|.

    Tokens are drawn from the first distribution p, so that with d = log q - log p of each the mean of exp(d) - 1 - d estimates
    the divergence of q from p without bias, and no term is negative (Schulman 2020, "Approximating KL divergence", k3).

    Parameters
    ----------
    pairs : for each request, log-probabilities of its tokens by p and by q, in nats.

    Returns
    -------
    tokens; and where there are some `kl`, its standard error `kl_error` over requests, and statistics of |difference|.
    """
    differences = [np.subtract(read, own) for own, read in pairs if len(own)]
    if not differences:
        return {"tokens": 0}
    together = np.concatenate(differences)
    terms = [np.expm1(each) - each for each in differences]
    kl = float(np.concatenate(terms).mean())
    # Of a ratio of sums over requests, which are independent; tokens of a request are not.
    error = math.sqrt(sum(float((each - kl).sum()) ** 2 for each in terms)) / len(together)
    middle = {f"p{round(q * 100)}": float(np.quantile(np.abs(together), q)) for q in (0.5, 0.99)}
    sizes = {"mean": float(np.abs(together).mean())} | middle | {"max": float(np.abs(together).max())}
    return {"tokens": len(together), "kl": kl, "kl_error": error, "difference": sizes}


def totals(requests, cached, preempted, aborted):
    """Return counts of the load.

    Parameters
    ----------
    requests : all that were added.
    cached : for each request that ended, tokens of its prompt that were in the prefix cache.
    preempted : names of sequences, one for each preemption.
    aborted : how many requests.
    """
    return {
        "requests": len(requests),
        "several_answers": sum(request.answers > 1 for request in requests),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "ended": len(cached),
        "aborted": aborted,
        "preemptions": len(preempted),
        "preempted_requests": len(Counter(preempted)),
        "prefix_hits": sum(count > 0 for count in cached),
        "cached_tokens": sum(cached),
    }
