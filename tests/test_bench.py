"""Measuring speed: turns, limits and peers. Nothing here looks at how long anything takes."""

import json
import re

import pytest
import torch
from torch import nn

from reality_stone import bench, cli, ops, show
from reality_stone.bench import contenders, measure, roofline, timing
from reality_stone.bench.peers import PEERS, Peer
from reality_stone.bench.roofline import Ceiling, Work
from reality_stone.bench.timing import Timing
from reality_stone.codecs import REGISTRY, codec

CODEC = "uniform(bits=4, group=16)"


@pytest.fixture
def quick(monkeypatch):
    """Small caches, small products and two calls instead of seconds."""
    monkeypatch.setattr(contenders, "cache_bytes", lambda *_: 1 << 10)
    monkeypatch.setitem(roofline.MATMUL, "cpu", (8, 16, 8))
    few = {"turns": 2, "turn_seconds": 1e-9}
    monkeypatch.setattr(
        measure, "interleaved", lambda cases, **how: timing.interleaved(cases, **how | few)
    )


@pytest.fixture
def run(capsys):
    """Run `reality-stone bench` on small matrices: (exit code, stdout, stderr)."""

    def call(*argv) -> tuple[int, str, str]:
        shapes = ["--shapes", "48x64,33x32", "--batches", "1,3", "--codecs", CODEC]
        code = cli.main(["bench", *shapes, *map(str, argv)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def dense(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def peer(name: str, build, library: str = "torch") -> Peer:
    return Peer(name, library, build, lambda shape: 32.0, torch.float32)


# --- turns ---


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_random_packed_is_valid_at_any_size(name):
    for shape in ((48, 64), (100, 70), (5, 33)):
        packed = bench.random_packed(REGISTRY[name](), shape)
        packed.check()
        assert packed.decode().isfinite().all()
        assert packed.decode().abs().max() > 0


def test_turns_are_interleaved_and_copies_rotate():
    order = []
    cases = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    found = bench.interleaved(cases, turns=5, turn_seconds=1e-9)
    assert found["a"].turns == 5
    assert order[4:] == [(name, i) for i in range(5) for name in "ab"]
    assert bench.copies_for(10, cache=100) * 10 > 300
    assert bench.copies_for(1000, cache=100) == 1


def test_turns_are_fewer_where_they_would_take_too_long():
    calls = []

    def clock(run, first, last):  # a second a call
        calls.append(last - first)
        return float(last - first)

    for limit, turns in ((100.0, 11), (16.0, 8), (1.0, timing.LEAST_TURNS)):
        found = bench.interleaved({"a": print, "b": print}, turns=11, limit=limit, clock=clock)
        assert found["a"] == Timing(1.0, 0.0, turns)
    assert set(calls) == {1}


def test_the_spread_is_half_of_the_middle():
    found = timing._timing([1.0] * 2 + [2.0] * 6 + [3.0] * 2 + [50.0])
    assert (found.seconds, found.spread) == (2.0, (3.0 - 1.0) / 2 / 2.0)


# --- limits ---


def test_work_counts_what_each_product_reads_and_writes():
    shape, batch = (30, 20), 7
    activations, flops = 7 * (30 + 20) * 4, 2 * 7 * 30 * 20

    def work(backward, rereads=True):
        return roofline.work(shape, batch, backward, 4, 1000, 80, rereads)

    assert work("none") == Work(1000 + activations, flops)
    assert work("input") == Work(2 * (1000 + activations), 2 * flops)
    assert work("all") == Work(3 * (1000 + activations) + 80, 3 * flops)
    # The gradient of a dense weight needs no weight.
    assert work("all", rereads=False) == Work(2 * 1000 + 3 * activations + 80, 3 * flops)


def test_a_share_is_that_of_the_nearer_limit():
    ceiling = Ceiling(bytes=100.0, flops=1000.0)
    assert roofline.share(Work(40, 100), 0.5, ceiling) == (0.8, "memory")
    assert roofline.share(Work(10, 300), 0.5, ceiling) == (0.6, "compute")


def test_the_limit_of_memory_is_the_faster_of_copying_and_reading(monkeypatch):
    monkeypatch.setitem(roofline.MATMUL, "cpu", (8, 16, 4))
    limits = roofline.Limits(torch.device("cpu"), 2048)
    assert limits.bytes == 4 * 2048
    seconds = {roofline.COPY: 2.0, roofline.READ: 0.5, roofline.MULTIPLY: 4.0}
    timings = {name: Timing(s, 0.0, 5) for name, s in seconds.items()}
    assert limits.ceiling(timings) == Ceiling(limits.bytes / 0.5, 2 * 8 * 16 * 4 / 4.0)
    timings[roofline.COPY] = Timing(0.5, 0.0, 5)  # it reads and writes
    assert limits.ceiling(timings).bytes == 2 * limits.bytes / 0.5
    for name, case in limits.cases.items():
        assert torch.is_tensor(case(0)), name


@pytest.mark.usefixtures("quick")
def test_work_of_a_layer_counts_the_bytes_it_stores():
    shape = (48, 64)
    ours = contenders.packed(codec(CODEC), shape, "cpu")
    stored = ours.copies[0].bits / 8
    assert ours.work(shape, 1, "none").bytes == stored + (48 + 64) * 4
    trained = sum(p.nbytes for p in ours.copies[0].params.values())
    assert ours.work(shape, 1, "all").bytes == 3 * (stored + (48 + 64) * 4) + trained
    half = contenders.dense(shape, "cpu")["torch bfloat16"]
    assert half.work(shape, 2, "none").bytes == 48 * 64 * 2 + 2 * (48 + 64) * 2


@pytest.mark.usefixtures("quick")
def test_the_accuracy_of_the_products_is_set_while_they_run_and_stated(run):
    with pytest.raises(ValueError, match="accuracy is one of auto, exact, int8, got 'best'"):
        bench.How(accuracy="best")
    for mode in ops.ACCURACIES:
        code, out, _ = run("--accuracy", mode)
        assert code == 0
        assert f"accuracy {mode}, cpu" in out
        rows = json.loads(run("--accuracy", mode, "--json")[1])["results"]
        assert {row["accuracy"] for row in rows} == {mode}
        assert ops._C.accuracy() == "auto"
    seen = set()
    how = bench.How(accuracy="int8", roofline=False)

    class Spy(nn.Linear):
        def forward(self, x):
            seen.add(ops._C.accuracy())
            return super().forward(x)

    def build(weight):
        layer = Spy(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        return layer

    spy = peer("spy", build)
    for _ in bench.bench([(48, 64)], [1], [codec(CODEC)], [spy], how, progress=False):
        assert ops._C.accuracy() == "auto"
    assert "int8" in seen


# --- peers ---


@pytest.mark.usefixtures("quick")
def test_a_peer_that_is_missing_or_fails_is_printed_with_its_reason():
    class Breaks(nn.Linear):
        def forward(self, x):
            if x.shape[0] == 3:
                raise RuntimeError("no kernel for three\nand a long story")
            return super().forward(x)

    def breaks(weight):
        layer = Breaks(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        return layer

    peers = [
        peer("good", dense),
        peer("missing", dense, "no_such_library"),
        peer("breaks", breaks),
        peer("lies", lambda weight: dense(-weight)),
    ]
    found = list(bench.bench([(48, 64)], [1, 3], [codec(CODEC)], peers, progress=False))
    failed = [(r.what, r.batch, r.reason) for r in found if isinstance(r, bench.Failed)]
    assert failed == [
        ("missing", 1, "no_such_library is not installed"),
        ("lies", 1, "its product is wrong, relative error 2.00"),
        ("missing", 3, "no_such_library is not installed"),
        ("lies", 3, "its product is wrong, relative error 2.00"),
        ("breaks", 3, "RuntimeError: no kernel for three"),
    ]
    timed = [(r.what, r.batch) for r in found if isinstance(r, bench.Result) and r.kind == "peer"]
    assert timed == [("good", 1), ("breaks", 1), ("good", 3)]
    text = show.benchmark(found)
    assert "left out: missing: no_such_library is not installed\n" in text
    assert "left out: breaks: RuntimeError: no kernel for three (1 of 2 cases)\n" in text


@pytest.mark.usefixtures("quick")
def test_a_peer_without_a_gradient_is_left_out_of_a_backward():
    class Forward(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    def build(weight):
        layer = Forward(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        return layer

    how = bench.How(backward="input")
    peers = [peer("frozen", build), peer("good", dense)]
    found = list(bench.bench([(48, 64)], [2], [codec(CODEC)], peers, how, progress=False))
    assert [r.what for r in found if isinstance(r, bench.Failed)] == ["frozen"]
    assert len([r for r in found if isinstance(r, bench.Result)]) == 4


def test_our_own_codec_that_fails_is_an_error(quick, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(contenders, "_packed_product", broken)
    with pytest.raises(RuntimeError, match="broken"):
        list(bench.bench([(48, 64)], [2], [codec(CODEC)], progress=False))


@pytest.mark.parametrize("one", PEERS, ids=lambda p: p.name)
def test_every_peer_says_that_it_is_not_there_or_multiplies(one):
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) / 11
    if not one.installed:
        with pytest.raises(ImportError, match="is not installed"):
            one.layer(weight)
        return
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = one.layer(weight)(x.to(one.dtype)).float()
    # Round-to-nearest in groups of 64: about 0.5 at 2 bits, 0.1 at 4, 0.01 at 8.
    error = ((y - x @ weight.T).norm() / (x @ weight.T).norm()).item()
    assert error < {2: 0.7, 4: 0.15, 8: 0.03}[int(one.bits((128, 128)))]


def test_the_bits_of_peers_count_what_a_group_or_a_row_shares():
    bits = {one.name: one.bits((1024, 4096)) for one in PEERS}
    assert bits["bitsandbytes nf4"] == 4.5
    assert bits["hqq 2 bits"] == 2.5
    assert bits["bitsandbytes int8"] == 8 + 32 / 4096


# --- the command ---


@pytest.mark.usefixtures("quick")
def test_bench_prints_every_codec_beside_torch_with_its_share(run):
    for extra, backward in (
        ([], "none"), (["--backward"], "all"), (["--backward", "input"], "input")
    ):  # fmt: skip
        code, out, err = run(*extra, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["failed"] == []
        rows = found["results"]
        assert len(rows) == 2 * 2 * 3
        assert {one["backward"] for one in rows} == {backward}
        for one in rows:
            assert set(one) == set(bench.Result.__dataclass_fields__)
            assert min(one[k] for k in ("seconds", "share", "memory_limit", "compute_limit")) > 0
            assert one["bound"] in ("memory", "compute")
            assert one["what"] != "torch float32" or one["speedup"] == 1
    code, out, _ = run()
    assert code == 0
    assert "threads" in out
    assert "of limit" in out
    assert re.search(r"\d % (memory|compute)", out)
    assert "limits measured in the same turns" in out


@pytest.mark.usefixtures("quick")
def test_bench_names_peers_only_where_they_were_asked_for(run, monkeypatch):
    monkeypatch.setattr(bench, "PEERS", (peer("absent", dense, "no_such_library"),))
    assert "absent" not in run()[1]
    code, out, _ = run("--peers")
    assert code == 0
    assert "left out: absent: no_such_library is not installed" in out
    rows = json.loads(run("--peers", "--json")[1])["failed"]
    assert rows[0] == {
        "shape": [48, 64], "batch": 1, "what": "absent", "backward": "none",
        "reason": "no_such_library is not installed",
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_bench_draws_a_panel_a_case_and_a_bar_a_layer(run, tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = tmp_path / "bench.png", tmp_path / "bench.svg"
    assert run("--plot", png)[0] == 0
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert run("--plot", svg)[0] == 0
    # matplotlib draws text as outlines and leaves what it says in comments.
    said = re.findall(r"<!-- (.*?) -->", svg.read_text())
    for shape in ("48 x 64", "33 x 32"):
        for batch in (1, 3):
            assert f"{shape}, batch {batch}" in said
    for what in (CODEC, "torch float32", "torch bfloat16"):
        assert said.count(what) == 4
    assert "times as fast as torch float32" in said


def test_bench_without_a_gpu_says_so(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = run("--device", "cuda")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("reality-stone: error: there is no GPU that torch")


@pytest.mark.parametrize("setting", [{"backward": "params"}, {"device": "tpu"}])
def test_how_to_measure_is_checked(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} is one of .*, got"):
        bench.How(**setting)


@pytest.mark.parametrize(
    "argv", [("--backward", "params"), ("--device", "tpu"), ("--batches", "0")]
)
def test_options_that_make_no_sense_are_refused(run, argv):
    assert run(*argv)[0] == 2


# --- a GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_graph_runs_every_copy_once():
    total = torch.zeros(5, device="cuda")

    def run(i):
        total[i] += 1

    replay = timing.graphed(run, 5)
    before = total.clone()
    replay(0)
    assert (total - before).tolist() == [1.0] * 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("backward", ["none", "input", "all"])
def test_bench_runs_on_a_gpu(backward):
    how = bench.How(backward=backward, device="cuda", turns=5, turn_seconds=1e-3)
    found = list(bench.bench([(256, 256)], [1, 16], [codec(CODEC)], how=how, progress=False))
    assert len(found) == 2 * 3
    assert {r.against for r in found} == {"torch bfloat16"}
    assert all(r.seconds > 0 and r.share > 0 for r in found)
