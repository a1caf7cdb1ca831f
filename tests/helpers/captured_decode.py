"""A stand-in for CUDA graphs without a GPU, and a sampler that speculative decodes do not predict."""

import pytest
import torch
import transformers as tf

from elastickv.transformers.layer_storage import LayerStorage


class FakeRecorder:
    """Replaces CUDA graphs: recording stores nothing, and a replay runs the pass on the recorded tensors."""

    launches_speculatively = False

    def __init__(self):
        self.rehearsed = self.recorded = self.replayed = 0
        self.waits = self.fails = None

    def wait_for_others(self, host=False):
        pass

    def rehearse(self, run):
        self.rehearsed += 1
        return run(), self.waits

    def record(self, run):
        self.recorded += 1
        if self.fails:
            raise self.fails
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerStorage, "enqueue_step", queue_nothing)
            run()

        def replay():
            self.replayed += 1
            return run()

        return replay


def queue_nothing(store, keys, values, queries, scaling):
    return torch.zeros(queries.shape), torch.zeros(queries.shape[:2])


class Swerve(tf.LogitsProcessor):
    """From a position on, forbids the likeliest token at every third position."""

    def __init__(self, start):
        self.start = start

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.start and input_ids.shape[1] % 3 == 0:
            scores = scores.scatter(1, scores.argmax(-1, keepdim=True), -float("inf"))
        return scores
