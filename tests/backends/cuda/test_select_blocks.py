"""Pages that rows of queries list in a serving engine's blocks, and attention to listed pages alone; needs a GPU."""

import numpy as np
import pytest

from elastickv.kvcache.quantize import CODECS
from elastickv.kvcache.scorers import scale_factor
from elastickv.kvcache.scorers.bounds import BOUNDS
from elastickv.recipe import PAGE_TOKENS, Recipe
from tests.backends.cuda.block_engine import Engine

pytestmark = pytest.mark.gpu
FRACTIONS = ((1 / 4, 1 / 2), (1, 1), (1 / 3, 1))
ERROR = 4e-3
MOST_TOKENS = 4  # of a request in a step


class SelectingEngine(Engine):
    """Requests of which the first tokens are a prompt; the others read listed pages, which are checked one by one."""

    def __init__(self, lengths, prompts, text="int4", every=1, offset=0, capacity=None, fractions=FRACTIONS, **sizes):
        recipe, sizes = Recipe.parse(f"{text},pages=1"), {"head_dim": 128, "kv_heads": 2, "group": 4} | sizes
        self.capacity = capacity or -(-max(lengths) // PAGE_TOKENS)
        super().__init__(lengths, recipe, **sizes, list_capacity=self.capacity)
        torch = self.torch
        self.every, self.offset, self.ring = every, offset, 1 + -(-(MOST_TOKENS - 1) // every)
        self.prompts, self.ratios = np.array(prompts), np.zeros(len(lengths), int)
        self.slots = np.random.default_rng(1).permutation(2 * len(lengths))[: len(lengths)]
        self.fractions = np.array([row[: self.kv_heads] for row in fractions], np.float64)
        places = 2 * len(lengths), self.ring, self.kv_heads
        self.headers = torch.full((*places, 4), -1, dtype=torch.int32, device="cuda")
        self.page_lists = torch.zeros(*places, self.capacity, dtype=torch.uint16, device="cuda")
        self.chosen = {}  # (request's number, position of an anchor) -> pages of each KV head

    def lists(self):
        from elastickv.backends.cuda.block_arguments import PageListArguments

        self.sent = [self.torch.tensor(each, dtype=self.torch.int32).cuda() for each in (self.slots, self.prompts, self.ratios)]
        table = self.torch.tensor(self.fractions).cuda()
        self.sent.append(table)
        slots, prompts, ratios, _ = (each.data_ptr() for each in self.sent)
        return PageListArguments(
            request_indices=slots,
            prompts=prompts,
            ratio_numbers=ratios,
            fractions=table.data_ptr(),
            headers=self.headers.data_ptr(),
            page_lists=self.page_lists.data_ptr(),
            anchor_every=self.every,
            anchor_offset=self.offset,
            ring=self.ring,
            list_capacity=self.capacity,
        )

    def move(self, order):
        """Let the requests be in another order."""
        for name in ("keys", "values"):
            setattr(self, name, [getattr(self, name)[i] for i in order])
        for name in ("page_table", "window_table", "first"):
            setattr(self, name, getattr(self, name)[order].contiguous())
        for name in ("slots", "prompts", "ratios"):
            setattr(self, name, getattr(self, name)[order])

    def scores(self, request, query, pages, head):
        """Float64 scores of a request's first pages for the queries of a KV head, (group, head_dim)."""
        fmt, keys = self.recipe.key_format, self.keys[request][: pages * PAGE_TOKENS, head].float().cpu().numpy()
        _, scales, zeros = CODECS[fmt].quantize_keys(keys.reshape(pages, PAGE_TOKENS, self.dim))
        return BOUNDS.score(query, scale_factor(fmt) * scales.astype(np.float64), zeros)

    def rule(self, request, position):
        """Return the position of a token's anchor, the pages that it could list, and how many each KV head does; or None."""
        own = position - self.prompts[request]
        since = min(max(own, 0), (own + self.offset) % self.every)
        pages = max(position - since + 1 - self.window, 0) // PAGE_TOKENS
        counts = np.minimum(np.maximum((self.fractions[self.ratios[request]] * pages).astype(int), 1), pages)
        return None if own < 0 or (counts == pages).all() else (position - since, pages, counts)

    def listed(self, request, anchor, pages, counts, query):
        """Return the list that a row, an anchor, has left in the device's memory; it has the best pages."""
        number = (anchor - self.prompts[request] + self.offset) // self.every % self.ring
        lists, q = [], query.double().cpu().numpy().reshape(self.kv_heads, self.group, self.dim)
        for head, count in enumerate(counts):
            if count == pages:
                lists.append(np.arange(pages))
                continue
            place = int(self.slots[request]), int(number), head
            block = int(self.page_table[request, anchor // PAGE_TOKENS])
            assert self.headers[place].tolist() == [anchor, block, count, pages]
            listed = self.page_lists[place][:count].cpu().numpy().astype(int)
            assert listed[0] == 0 and (np.diff(listed) > 0).all() and listed[-1] < pages
            scores = self.scores(request, q[head], pages, head)
            unlisted = np.setdiff1d(np.arange(pages), listed)
            spread = np.abs(scores).max()
            assert count == 1 or scores[listed[1:]].min() >= scores[unlisted].max() - 1e-5 * spread
            lists.append(listed)
        return lists

    def run(self, before, after, forgotten=()):
        """Compute tokens before[i] to after[i] of each request; return the largest relative error of a row, and pages read."""
        rows = self.store(before, after)
        query, output = self.attend(
            rows, self.inputs[0], [m - n for n, m in zip(before, after, strict=True)], lists=self.lists()
        )
        errors, read, row = [], [], 0
        for request, (n, m) in enumerate(zip(before, after, strict=True)):
            for position in range(n, m):
                q, o = query[row], output[row]
                unread, rule = None, self.rule(request, position)
                if rule is not None and request not in forgotten:
                    anchor, pages, counts = rule
                    key = int(self.slots[request]), anchor
                    if anchor == position:
                        self.chosen[key] = self.listed(request, anchor, pages, counts, q)
                    unread = [np.setdiff1d(np.arange(pages), each) for each in self.chosen[key]]
                    read.append([len(each) for each in self.chosen[key]])
                expected = self.expected(request, position + 1, q, unread)
                errors.append(np.linalg.norm(o.double().cpu().numpy() - expected) / np.linalg.norm(expected))
                row += 1
        return max(errors), read


@pytest.fixture
def engine(open_cuda):
    pytest.importorskip("torch")
    return SelectingEngine


LENGTHS = (1000, 33, 2049, 300, 200, 161)


def prepared(engine, lengths=LENGTHS, own=8, prompts=None, **options):
    """Return an engine with the prompts of its requests stored, and how many tokens each has."""
    prompts = prompts or list(lengths)
    of = engine([n + own for n in lengths], prompts, **options)
    of.store([0] * len(lengths), list(lengths))
    return of, list(lengths)


def steps(of, now, *counts):
    """Compute steps of so many tokens a request."""
    for count in counts:
        after = [n + count for n in now]
        error, _ = of.run(now, after)
        assert error < ERROR
        now = after
    return now


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("int4", {}),
        ("int4,vgroup=32", {"head_dim": 64, "kv_heads": 3, "group": 7, "fractions": ((1 / 4, 1 / 2, 1 / 8),)}),
        ("k=int8_per_channel,v=int8", {"head_dim": 96, "group": 1}),
        ("k=int8_per_channel,v=int4", {"kv_heads": 1, "group": 16, "dtype": "fp16"}),
        ("int4", {"head_dim": 256, "group": 2}),
    ],
)
def test_a_token_of_its_own_lists_the_best_pages_and_reads_them_alone(engine, text, sizes):
    of, now = prepared(engine, text=text, **sizes)
    steps(of, now, 1)
    assert len(of.chosen) == 4  # 33 tokens are all in the window, and of 161 one page is not


def test_a_wrong_list_is_noticed(engine):
    """The check of the other tests: attention to another page is not what they accept."""
    of, now = prepared(engine, every=4)
    now = steps(of, now, 1)
    for lists in of.chosen.values():
        for each in lists:
            if len(each) > 1 and each[-1] == len(each) + 1:
                each[-1] -= 1
            elif len(each) > 1:
                each[1] = next(page for page in range(1, 200) if page not in each)
    assert of.run(now, [n + 1 for n in now])[0] > 2 * ERROR


@pytest.mark.parametrize(("every", "offset"), [(1, 0), (4, 0), (4, 3), (5, 2)])
def test_tokens_between_anchors_read_the_list_and_the_pages_that_left_the_window_since(engine, every, offset):
    of, now = prepared(engine, (1000, 191, 500), own=40, every=every, offset=offset, window=32)
    steps(of, now, *[1] * 40)


def test_tokens_of_the_prompt_read_every_page(engine):
    of, now = prepared(engine, prompts=[n + 2 for n in LENGTHS], every=4)
    for _ in range(2):
        after = [n + 1 for n in now]
        error, read = of.run(now, after)
        assert error < ERROR and not read
        now = after
    assert (of.headers == -1).all()
    steps(of, now, 1, 1)


def test_requests_keep_their_lists_when_rows_move(engine):
    of, now = prepared(engine, every=8)
    now = np.array(steps(of, now, 1))
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(now)).tolist()
        of.move(order)
        now = np.array(steps(of, now[order].tolist(), 1))


def test_a_list_of_another_request_is_not_read(engine):
    of, now = prepared(engine, own=12, every=8)
    now = steps(of, now, 1, 1)
    of.headers[int(of.slots[0]), :, :, 0] += 1  # its anchor was at another position
    of.headers[int(of.slots[2]), :, :, 1] += 1  # in another block
    of.headers[int(of.slots[3]), :, :, 2] += 1  # it has another length
    for _ in range(6):
        after = [n + 1 for n in now]
        assert of.run(now, after, forgotten=(0, 2, 3))[0] < ERROR
        now = after
    # From the next anchor on they have lists again.
    steps(of, now, 1, 1)


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_drafts_choose_by_their_own_queries_and_may_be_taken_back(engine, every):
    of, now = prepared(engine, (1000, 700, 500), own=40, every=every, offset=every // 2)
    random = np.random.default_rng(0)
    for _ in range(8):
        after = [n + MOST_TOKENS for n in now]
        error, _ = of.run(now, after)
        assert error < ERROR
        now = [n + int(random.integers(1, MOST_TOKENS + 1)) for n in now]


def test_requests_with_different_numbers_of_tokens_select_in_one_launch(engine):
    of, now = prepared(engine, own=20, every=3)
    for counts in ((1, 4, 2, 3, 1, 2), (2, 1, 1, 4, 3, 1), (1, 1, 3, 1, 1, 4)):
        after = [n + count for n, count in zip(now, counts, strict=True)]
        error, _ = of.run(now, after)
        assert error < ERROR
        now = after


def test_each_request_has_its_own_ratio(engine):
    of, now = prepared(engine, every=4)
    of.ratios[:] = [0, 1, 2, 1, 2, 0]
    error, read = of.run(now, [n + 1 for n in now])
    pages = [(n + 1 - of.window) // PAGE_TOKENS for n in now]
    assert error < ERROR
    # A request whose heads all read every page has no list, as one with one page has none.
    assert read == [[int(f * pages[i]) or 1 for f in of.fractions[of.ratios[i]]] for i in (0, 2, 4)]


@pytest.mark.parametrize(("length", "capacity"), [(40000, 1300), (40000, 4096), (290000, 9100)])
def test_long_requests_are_scored_by_several_blocks(engine, length, capacity):
    """The last one has more pages than shared memory has room for."""
    sizes = {"head_dim": 64, "kv_heads": 1, "group": 2}
    of, now = prepared(engine, (length, 300, 9000), own=4, capacity=capacity, every=2, **sizes)
    steps(of, now, 1, 1, 1)


def test_many_rows_are_scored_by_one_block_each(engine):
    lengths = [300 + 11 * i for i in range(140)]
    of, now = prepared(engine, lengths, own=4, every=2, head_dim=64, kv_heads=3, fractions=((1 / 4, 1 / 2, 1 / 8),))
    steps(of, now, 1, 1)


def test_equal_pages_are_listed_from_the_first_on(engine):
    of = engine([2000], [1999])
    of.keys[0][:] = of.keys[0][0]
    of.store([0], [1999])
    assert of.run([1999], [2000])[0] < ERROR
    ((listed, _),) = of.chosen.values()
    assert listed.tolist() == list(range(len(listed)))


def test_a_captured_graph_selects_at_each_step_anew(engine):
    of, now = prepared(engine, (700, 300), own=50, every=4)
    torch = of.torch
    now = steps(of, now, 1)  # kernels are loaded
    rows = of.rows(now, [n + 1 for n in now])
    keys, values = of.step
    query = of.random(2, of.kv_heads * of.group)
    output, view = torch.empty_like(query), of.view(query)
    lists = of.lists()
    lengths, starts, slots, _ = (each.clone() for each in of.inputs)

    def step():
        of.device.follow(torch.cuda.current_stream().cuda_stream)
        of.kernels.store(of.arguments(), rows, lengths.data_ptr(), starts.data_ptr(), slots.data_ptr(), of.bad.data_ptr(), 2, 1)
        of.kernels.decode(of.arguments(), rows, view, output.data_ptr(), lengths.data_ptr(), of.first.data_ptr(), lists=lists)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(40):
        for request, n in enumerate(now):
            keys[request], values[request] = of.keys[request][n], of.values[request][n]
            slots[request] = of.window_table[request, n // of.size] * of.size + n % of.size
        now = [n + 1 for n in now]
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        query.copy_(of.random(2, of.kv_heads * of.group))
        graph.replay()
        torch.cuda.synchronize()
        for request, n in enumerate(now):
            anchor, pages, counts = of.rule(request, n - 1)
            key = int(of.slots[request]), anchor
            if anchor == n - 1:
                of.chosen[key] = of.listed(request, anchor, pages, counts, query[request])
            unread = [np.setdiff1d(np.arange(pages), each) for each in of.chosen[key]]
            expected = of.expected(request, n, query[request], unread)
            assert np.linalg.norm(output[request].double().cpu().numpy() - expected) < ERROR * np.linalg.norm(expected)


def test_rows_of_no_request_read_nothing(engine):
    of, now = prepared(engine, (700, 300, 200), every=4)
    torch = of.torch
    rows = of.store(now, [n + 1 for n in now])
    lengths = torch.tensor([701, 0, 0], dtype=torch.int32, device="cuda")
    of.prompts[1:] = 2**31 - 1
    _, output = of.attend(rows, lengths, [1, 1, 1], lists=of.lists())
    assert (output[1:] == 0).all() and output[0].abs().sum() > 0
