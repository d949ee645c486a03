"""finetune: its modes, and runs that go on after an interruption as if there had been none."""

import copy
import json
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import reality_stone as rs
from reality_stone.nn import lora
from reality_stone.training import resume
from reality_stone.training.blockwise import reconstruct


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Predicts the next token from this one through two compressible blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 24)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def models():
    torch.manual_seed(0)
    dense = Model().eval()
    packed = copy.deepcopy(dense)
    codec = "uniform(bits=2, group=16)"
    rs.compress(packed, plan=[("blocks.*", codec), ("head", None)], progress=False)
    return dense, packed


def batches(rows=40):
    return torch.randint(24, (rows, 8), generator=torch.Generator().manual_seed(2))


OPTIONS = {
    "tables": {"mode": "tables"},
    "blocks": {"mode": "tables", "blockwise": True, "block_steps": 4},
    "codes": {"mode": "codes", "block_steps": 4},
    "lora": {"mode": "lora", "rank": 4},
}


def finetune(model, dense, **changed):
    options = {"batch": 4, "save_every": 3, "progress": False} | changed
    data = options.pop("batches", None)
    return rs.finetune(model, batches() if data is None else data, dense, **options)


def interrupt_at(model, call):
    """Raise KeyboardInterrupt in the model's forward pass of this number."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt

    return model.head.register_forward_pre_hook(hook)


def same(a, b):
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("mode", OPTIONS)
def test_an_interrupted_run_goes_on_with_the_losses_of_one_that_was_not(mode, tmp_path):
    dense, whole = models()
    torch.manual_seed(3)
    want = finetune(whole, dense, **OPTIONS[mode])
    _, first = models()
    torch.manual_seed(3)
    options = OPTIONS[mode] | {"state": tmp_path / "run"}
    # The block-wise stage passes the head once to collect the blocks' arguments.
    handle = interrupt_at(dense, 14 if mode in ("blocks", "codes") else 6)
    with pytest.raises(KeyboardInterrupt, match="goes on"):
        finetune(first, dense, **options)
    handle.remove()
    _, second = models()
    torch.manual_seed(77)  # what the generator gives is kept in the state
    got = finetune(second, dense, **options)
    assert got.losses == want.losses
    assert got.tokens == want.tokens
    assert same(second, whole)
    _, third = models()
    again = finetune(third, dense, **options)  # a finished run gives its result again
    assert again.losses == want.losses
    assert same(third, whole)


def test_an_interrupt_between_blocks_does_not_do_the_finished_ones_again(tmp_path, monkeypatch):
    dense, whole = models()
    options = OPTIONS["codes"]
    want = finetune(whole, dense, **options)
    _, packed = models()
    saved = resume.State.save

    def save_then_stop(self, stage, *rest, **record):
        saved(self, stage, *rest, **record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.State, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            finetune(packed, dense, state=tmp_path, **options)
    _, fresh = models()
    got = finetune(fresh, dense, state=tmp_path, **options)
    assert [b["name"] for b in want.blocks] == ["blocks.0", "blocks.1"]
    assert [b["name"] for b in got.blocks] == ["blocks.1"]
    assert got.losses == want.losses
    assert same(fresh, whole)


def test_dropout_of_adapters_goes_on_from_the_same_random_numbers(tmp_path):
    def run(model, **options):
        lora.add_lora(model, rank=4, dropout=0.5)
        return finetune(model, dense, mode="lora", **options)

    dense, whole = models()
    torch.manual_seed(3)
    want = run(whole)
    _, first = models()
    torch.manual_seed(3)
    handle = interrupt_at(dense, 6)
    with pytest.raises(KeyboardInterrupt):
        run(first, state=tmp_path)
    handle.remove()
    _, second = models()
    assert run(second, state=tmp_path).losses == want.losses


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_random_steps_and_in_a_save_ends_as_if_never_killed(tmp_path):
    program = """
        import json, os, random, signal, sys
        import torch
        torch.set_num_threads(1)
        import test_finetune_verb as t
        from reality_stone import tensorfile
        where, chance = sys.argv[1], random.Random(int(sys.argv[2]))

        def child(state, kill):
            dense, packed = t.models()
            if kill == "save":
                whole = tensorfile.write
                def write(path, tensors, metadata):
                    whole(path, tensors, metadata)
                    os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                tensorfile.write = write
            elif kill:
                count = iter(range(1, 1000))
                def hook(*_):
                    if next(count) == kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                dense.register_forward_pre_hook(hook)
            report = t.finetune(packed, dense, state=state, **t.OPTIONS["codes"])
            with open(f"{where}/{'whole' if state is None else 'killed'}.json", "w") as file:
                json.dump([report.losses, [p.tolist() for p in packed.parameters()]], file)

        def run(state, kill):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    child(state, kill)
                    code = 0
                finally:
                    os._exit(code)
            return os.waitpid(pid, 0)[1]

        assert run(None, None) == 0
        # The blocks take 20 passes of the teacher, the steps one each.
        kills = [chance.randint(22, 28), "save", chance.randint(1, 3), None]
        ends = [run(where + "/state", kill) for kill in kills]
        assert ends == [signal.SIGKILL] * 3 + [0], (kills, ends)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(random.randrange(999))],
        cwd=__file__.rpartition("/")[0], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, killed = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "killed"))
    assert killed == whole


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A state of a run that was stopped, the run's models as they were at its start."""
    dense, packed = models()
    where = tmp_path_factory.mktemp("begun")
    handle = interrupt_at(dense, 6)
    with pytest.raises(KeyboardInterrupt):
        finetune(packed, dense, state=where)
    handle.remove()
    return where


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"lr": 2e-3}, "another lr: 0.001 there, 0.002 now"),
        ({"mode": "codes"}, "another mode: tables there, codes now"),
        ({"mode": "lora"}, "another mode"),
        ({"epochs": 2}, "another epochs"),
        ({"batch": 5}, "another batch"),
        ({"precision": "bfloat16"}, "another precision"),
        ({"batches": batches(44)}, "number of steps: 10 there, 11 now"),
        ({"batches": batches() + 1 - batches().clamp(max=1)}, "text of the batches"),
        ({"teacher": None}, "teacher: .* there, none now"),
        ({"codec": "uniform(bits=3, group=16)"}, r"layer 'blocks.0.up': uniform\(bits=2"),
        ({"embed": 1.0}, "values outside compressed layers"),
        ({"codes": 1}, "another codes"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_another_run_is_refused_with_the_difference_and_changes_nothing(begun, changed, word):
    dense, packed = models()
    changed = dict(changed)
    if "codec" in changed:
        packed = copy.deepcopy(dense)
        plan = [("blocks.*", changed.pop("codec")), ("head", None)]
        rs.compress(packed, plan=plan, progress=False)
    if "embed" in changed:
        packed.embed.weight.data[0, 0] += changed.pop("embed")
    if "codes" in changed:
        packed.blocks[0].up.codes[0, 0, 0] ^= changed.pop("codes")
    teacher = changed.pop("teacher", dense)
    before = copy.deepcopy(packed)
    stored = (begun / resume.FILE).read_bytes()
    with pytest.raises(ValueError, match=word) as caught:
        finetune(packed, teacher, state=begun, **changed)
    assert "\n" not in str(caught.value)
    assert same(before, packed)
    assert same(packed, before)  # no adapters were left either
    assert (begun / resume.FILE).read_bytes() == stored


def test_a_damaged_state_is_refused_in_one_sentence(begun, tmp_path):
    raw = (begun / resume.FILE).read_bytes()
    chance = random.Random(5)
    cases = [raw[:size] for size in (0, 7, 100, len(raw) // 2, len(raw) - 1)]
    for at in [chance.randrange(len(raw) // 3, len(raw)) for _ in range(8)]:
        cases.append(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
    refused = 0
    for case in cases:
        (tmp_path / resume.FILE).write_bytes(case)
        dense, packed = models()
        before = copy.deepcopy(packed)
        with pytest.raises(ValueError, match=resume.FILE) as caught:
            finetune(packed, dense, state=tmp_path)
        refused += "\n" not in str(caught.value)
        assert same(before, packed)
    assert refused == len(cases)


def test_a_foreign_file_and_a_place_that_is_no_directory_are_refused(tmp_path):
    dense, packed = models()
    from reality_stone import tensorfile

    tensorfile.write(tmp_path / resume.FILE, {"x": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match="no state of a training run"):
        finetune(packed, dense, state=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no state can be kept"):
        finetune(packed, dense, state=tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="save_every"):
        finetune(packed, dense, state=tmp_path / "new", save_every=0)


def test_codes_mode_is_reconstruct_and_then_tables():
    dense, packed = models()
    _, by_hand = models()
    before = rs.kl_divergence(packed, dense, batches(), context=8)
    codes = packed.blocks[0].up.codes.clone()
    report = finetune(packed, dense, **OPTIONS["codes"])
    found = reconstruct(
        by_hand, dense, list(batches().split(4)), steps=4, batch=4, precision="float32",
        progress=False,
    )  # fmt: skip
    finetune(by_hand, dense)
    assert same(packed, by_hand)
    assert report.blocks == found.to_json()["blocks"]
    assert not torch.equal(packed.blocks[0].up.codes, codes)
    assert rs.kl_divergence(packed, dense, batches(), context=8) < before


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "codes"}, "needs teacher="), ({"blockwise": True}, "needs teacher="),
        ({"mode": "lora", "blockwise": True}, "not with 'lora'"), ({"mode": "all"}, "mode must be"),
        ({"precision": "half"}, "precision must be"),
        ({"mode": "lora", "precision": "half"}, "precision must be"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused_before_any_change(options, word):
    _, packed = models()
    before = copy.deepcopy(packed)
    with pytest.raises(ValueError, match=word):
        finetune(packed, None, **options)
    assert same(before, packed)
    assert same(packed, before)


@pytest.mark.parametrize("mode", ["tables", "lora"])
def test_a_forward_in_bfloat16_trains_parameters_in_float32(mode):
    dense, packed = models()
    before = rs.kl_divergence(packed, dense, batches(), context=8)
    finetune(packed, dense, epochs=4, lr=5e-3, precision="bfloat16", **OPTIONS[mode])
    assert all(p.dtype == torch.float32 for p in packed.parameters())
    assert rs.kl_divergence(packed, dense, batches(), context=8) < 0.9 * before


def test_only_what_moves_is_in_the_state(begun):
    from reality_stone import tensorfile

    names = set(tensorfile.read_header(begun / resume.FILE).entries)
    assert not any("codes" in name or "embed" in name or "bias" in name for name in names)
    trained = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert len(trained) >= 4  # at least one table for each layer
    assert {f"adam.exp_avg.{name}" for name in trained} <= names
