"""One backend of `serving_soak.py` in a vLLM engine of its own: reads what to run, writes its record as it goes.

python benchmarks/soak_engine.py PLAN.json RECORD.json
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from command_line import exit_with
from serving_record import said
from soak_load import Checked, Load, Sample, Step, agreement, in_turns, step_times, totals

from elastickv.vllm.teacher_forcing.engine_environment import engine_environment

CHECKED, CHUNK = 50, 64  # requests; tokens of a step when they are read the second time
WARM_STEPS = 500  # what is compiled or allocated once is by then
NOTE_EVERY = 500  # steps, of memory and of the record
NOTE_CHECKS = 10  # requests that are checked
WAITING = 12  # requests beyond those that can run
_STEPS_SHARE, _CHECK_SHARE = 0.6, 0.95  # of the seconds after the engine's start


class ScheduledBatches:
    """What an engine's scheduler has scheduled, seen by wrapping its `schedule`."""

    def __init__(self, scheduler):
        self.requests, self.tokens, self.decode, self.preempted = 0, 0, False, []
        self._schedule, scheduler.schedule = scheduler.schedule, self._scheduled

    def _scheduled(self, *arguments, **options):
        output = self._schedule(*arguments, **options)
        counts = output.num_scheduled_tokens
        self.requests, self.tokens = len(counts), sum(counts.values())
        self.decode = bool(counts) and self.requests == self.tokens and not output.scheduled_new_reqs
        self.preempted += output.preempted_req_ids or ()
        return output

    def forget(self):
        """Forget the last batch: a step that schedules nothing leaves none."""
        self.requests, self.tokens, self.decode = 0, 0, False


class Soak:
    """An engine under load."""

    def __init__(self, plan):
        from vllm import LLM
        from vllm.config import CompilationConfig

        options = dict(plan["engine"])
        if sizes := options.pop("cudagraph_capture_sizes", None):
            options["compilation_config"] = CompilationConfig(cudagraph_capture_sizes=sizes)
        if plan["scan_modules"]:
            let_vllm_scan_modules()
        self.llm = LLM(model=plan["model"], **options)
        self.engine, self.core = self.llm.llm_engine, self.llm.llm_engine.engine_core.engine_core
        self.batches = ScheduledBatches(self.core.scheduler)
        self.load = Load(plan["vocabulary"], plan["longest_prompt"], plan["longest_answer"], plan["seed"])
        self.sample = Sample(CHECKED, np.random.default_rng(plan["seed"]))
        self.most = plan["engine"]["max_num_seqs"] + WAITING
        self.running, self.added, self.cached, self.steps, self.memory, self.checked = {}, [], [], [], [], []
        self.aborted = self.not_finite = 0
        self.free_at_start = self.free_blocks

    @property
    def free_blocks(self):
        return self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(self, name, prompt, tokens, **sampling):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = {"temperature": 1.0, "ignore_eos": True, "logprobs": 0, "detokenize": False} | sampling
        settings["output_kind"] = RequestOutputKind.FINAL_ONLY
        self.engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(max_tokens=tokens, **settings))

    def run(self, steps, deadline, note):
        """Take steps under load until a number or a time; call `note` every `NOTE_EVERY` steps."""
        previous, ended = False, time.perf_counter()
        for number in range(steps):
            changed = self.arrive(number) | self.abort()
            self.batches.forget()
            outputs = [output for output in self.engine.step() if output.finished]
            now = time.perf_counter()
            decode = self.batches.decode and previous and not changed
            self.steps.append(Step(number, (now - ended) * 1e3, self.batches.requests, self.batches.tokens, decode))
            # A step after one that ended requests has another batch, and ours took time to look at them.
            previous, ended = self.batches.decode and not outputs, now
            for output in outputs:
                self.end(output)
            if (number + 1) % NOTE_EVERY == 0:
                self.memory.append({"step": number + 1} | memory())
                note()
                previous, ended = False, time.perf_counter()
            if time.time() > deadline:
                break

    def arrive(self, number):
        arrived = self.load.arrivals(number, self.most - len(self.running))
        for request in arrived:
            self.add(request.name, request.prompt, request.tokens, n=request.answers)
            self.running[request.name] = request
        self.added += arrived
        return bool(arrived)

    def abort(self):
        name = self.load.aborted(list(self.running))
        if name is not None:
            self.engine.abort_request([name])
            del self.running[name]
            self.aborted += 1
        return name is not None

    def end(self, output):
        request = self.running.pop(output.request_id, None)
        if request is None:
            return
        self.cached.append(output.num_cached_tokens or 0)
        answers = [chosen(part) for part in output.outputs]
        self.not_finite += int(sum((~np.isfinite(logprobs)).sum() for _, logprobs in answers))
        if request.answers == 1:
            history = "prefix hit" if self.cached[-1] else "plain"
            history = "preempted" if request.name in self.batches.preempted else history
            self.sample.offer(Checked(request.prompt, *answers[0], history))

    def drain(self):
        """Abort what is left, and process what is in flight; return what was free at the start and is now."""
        self.engine.abort_request(list(self.running))
        self.running.clear()
        self.settle()
        reset = self.llm.reset_prefix_cache()
        return {"free_at_start": self.free_at_start, "free_at_end": self.free_blocks, "prefix_cache_reset": bool(reset)}

    def settle(self):
        """With asynchronous scheduling a step is in flight when the last request has ended."""
        while self.engine.has_unfinished_requests():
            self.engine.step()
        for _ in range(3):
            self.engine.step()

    def finish(self):
        """Step until the only request has ended; return its output."""
        found = None
        while self.engine.has_unfinished_requests():
            found = next((output for output in self.engine.step() if output.finished), found)
        return found

    def check(self, deadline, note):
        """Give sampled requests again, each alone in a fresh cache, while there is time; `note` is called now and then."""
        for number, each in enumerate(in_turns(self.sample.items)):
            if time.time() > deadline:
                break
            each.read = self.read(f"read-{number}", each.prompt, each.tokens)
            scheduler, most = self.core.scheduler, self.core.scheduler.max_num_scheduled_tokens
            scheduler.max_num_scheduled_tokens = CHUNK
            each.reread = self.read(f"reread-{number}", each.prompt, each.tokens)
            scheduler.max_num_scheduled_tokens = most
            self.checked.append(each)
            if number % NOTE_CHECKS == 0:
                note()
        note()

    def read(self, name, prompt, tokens):
        """Return log-probabilities of an answer's tokens, read with its prompt as one prompt in a fresh cache."""
        self.fresh()
        self.add(name, prompt + tokens, 1, prompt_logprobs=0)
        rows = self.finish().prompt_logprobs[len(prompt) :]
        return [row[token].logprob for row, token in zip(rows, tokens, strict=True)]

    def fresh(self):
        self.settle()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("blocks are in use although no request is there")


def chosen(part):
    """Return tokens of an answer and their log-probabilities."""
    tokens = list(part.token_ids)
    return tokens, [row[token].logprob for row, token in zip(part.logprobs, tokens, strict=True)]


def memory():
    """Return bytes: resident of this process, allocated by PyTorch on the GPU, in use on the device."""
    import torch

    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if not torch.cuda.is_available():
        return {"resident_bytes": resident}
    free, total = torch.cuda.mem_get_info()
    return {"resident_bytes": resident, "torch_bytes": torch.cuda.memory_allocated(), "device_bytes": total - free}


def let_vllm_scan_modules():
    """Make llvmlite's library say that it has no `__dict__`: vLLM 0.32 on CPUs reads it of everything when an engine starts."""
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    function = library.__getattr__

    def attribute(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return function(self, name)

    library.__getattr__ = attribute


def soak(plan, save, began):
    """Run one backend."""
    if plan["ours"]:
        from elastickv.vllm.plugin import register

        register()
    engine = Soak(plan)
    started, end = time.time(), began + plan["seconds"]
    environment = engine_environment(engine.core)
    save(startup_s=started - began, environment=environment)
    if plan["ours"] != any(name.startswith("elastickv.") for name in environment["backends"]):
        raise RuntimeError(f"vLLM took {', '.join(environment['backends'])}: is the plug-in installed?")

    def note():
        counts = totals(engine.added, engine.cached, engine.batches.preempted, engine.aborted)
        times = step_times(engine.steps, WARM_STEPS)
        save(steps=len(engine.steps), counts=counts, not_finite=engine.not_finite, memory=engine.memory, times=times)

    def note_checked():
        save(agreement=agreement(engine.checked), agreement_sample=len(engine.sample.items))

    engine.run(plan["steps"], started + _STEPS_SHARE * (end - started), note)
    engine.memory.append({"step": len(engine.steps)} | memory())
    note()
    save(soak_s=time.time() - started, blocks=engine.drain())
    engine.check(started + _CHECK_SHARE * (end - started), note_checked)
    save(blocks_after_check=engine.drain(), done=True)


def main():
    began = float(os.environ.get("SOAK_BEGAN") or time.time())
    plan, path = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    record = {"done": False}

    def save(**values):
        record.update(values, seconds=time.time() - began)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(path)

    status = 0
    save()
    try:
        soak(plan, save, began)
    except Exception as error:
        traceback.print_exc()
        save(error=said(error))
        status = 1
    sys.stdout.flush()
    # An engine that is torn down by the interpreter may hang: all is written.
    os._exit(status)


if __name__ == "__main__":
    exit_with(main)
