"""Descent on codes: losses fall or nothing changes, beside any optimiser, on all ranks alike."""

import copy
import math
import os
import tempfile
import warnings

import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone.nn import RBELinear
from reality_stone.optim import CodeDescent

SHAPE = (32, 64)
CHANGING = [c for c in walk.DEFAULTS if c.fields(SHAPE) or c.name == "trellis"]
SMALL = "uniform(bits=2, group=32)"


class Problem:
    """Least squares: a layer of coarse codes, a target weight, inputs to train and to judge on."""

    def __init__(self, codec=SMALL, shape=SHAPE):
        out, n = shape
        weight = 0.1 * walk.gaussian(out, n)
        linear = nn.Linear(n, out)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.zero_()
        # Away from what was encoded: some codecs hold so small a weight all but exactly.
        self.target = weight + 0.05 * walk.gaussian(out, n, seed=5)
        self.model = nn.Sequential(RBELinear.from_linear(linear, codec))
        mix = torch.eye(n) + 0.3 * walk.gaussian(n, n, seed=9)
        x = walk.gaussian(512, n, seed=1) @ mix
        self.train, self.held = x[:256], x[256:]

    @property
    def codes(self) -> torch.Tensor:
        return self.model[0].codes

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return (self.model(x) - x @ self.target.t()).square().mean()

    def judge(self) -> torch.Tensor:
        return self.loss(self.held)


@pytest.mark.parametrize("codec", CHANGING, ids=walk.spec)
def test_descent_lowers_the_held_out_loss_and_codes_stay_codes(codec):
    problem = Problem(codec)
    first, now = problem.judge().item(), None
    with CodeDescent(problem.model, gather=1, share=0.05) as codes:
        for _ in range(8):
            problem.loss(problem.train).backward()
            before = problem.codes.clone()
            (step,) = codes.step(problem.judge)
            with torch.no_grad():
                now = problem.judge().item()
            if step.accepted:
                assert step.proposed > 0
                assert step.predicted < 0
                assert now == step.after < step.before
            else:
                assert torch.equal(problem.codes, before)
            problem.model[0].packed.check()
            if now < first:
                break
    assert now < first


def test_a_change_that_does_not_lower_the_loss_is_taken_back_and_the_next_is_smaller():
    problem = Problem()
    codes, before = CodeDescent(problem.model, gather=1, share=0.1), problem.codes.clone()
    sizes = []
    for _ in range(4):
        problem.loss(problem.train).backward()
        (step,) = codes.step(lambda: 1.0)
        assert not step.accepted
        assert torch.equal(problem.codes, before)
        sizes.append(step.proposed)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_half_batches_accumulate_to_the_proposal_of_the_whole():
    found = []
    for parts in (1, 2):
        problem = Problem()
        codes = CodeDescent(problem.model, gather=1, share=0.05)
        for x in problem.train.chunk(parts):
            (problem.loss(x) / parts).backward()
        codes.step(problem.judge)
        found.append(problem.codes.clone())
    assert torch.equal(*found)
    assert not torch.equal(found[0], Problem().codes)


def test_it_gathers_as_many_steps_as_it_was_told_and_takes_layers_in_turn():
    model = nn.Sequential(*(RBELinear(32, 32, codec=SMALL) for _ in range(3)))
    codes, seen = CodeDescent(model, gather=2, layers=1), []
    x = walk.gaussian(16, 32)
    for turn in range(6):
        assert [m.observer is not None for m in model].count(True) == 1
        model(x).square().mean().backward()
        steps = codes.step(lambda: model(x).square().mean())
        assert len(steps) == turn % 2
        seen += [step.layer for step in steps]
    assert sorted(seen) == ["0", "1", "2"]
    codes.close()
    assert all(m.observer is None for m in model)


def run(problem, optimiser, schedule, codes, steps: int) -> list[float]:
    losses = []
    for i in range(steps):
        loss = problem.loss(problem.train[32 * (i % 8) : 32 * (i % 8) + 32])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1)
        optimiser.step()
        schedule.step()
        codes.step(problem.judge)
        losses.append(loss.item())
    return losses


def tools(problem):
    optimiser = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 32)
    return optimiser, schedule, CodeDescent(problem.model, gather=3, share=0.05)


def test_a_resumed_run_has_identical_losses_and_codes():
    whole = Problem()
    all_tools = tools(whole)
    run(whole, *all_tools, 8)  # in the middle of a gathering
    kept = copy.deepcopy([part.state_dict() for part in (whole.model, *all_tools)])
    want = run(whole, *all_tools, 8)
    again = Problem()
    parts = (again.model, *tools(again))
    for part, state in zip(parts, kept, strict=True):
        part.load_state_dict(state)
    assert run(again, *parts[1:], 8) == want
    assert torch.equal(again.codes, whole.codes)
    assert not torch.equal(again.codes, Problem().codes)


def test_a_state_of_another_codec_or_model_is_refused():
    codes = CodeDescent(Problem().model)
    other = CodeDescent(Problem("uniform(bits=4, group=32)").model)
    with pytest.raises(ValueError, match=r"layer '0' is .*bits=2.* here, .*bits=4.* there"):
        codes.load_state_dict(other.state_dict())
    two = nn.Sequential(*Problem().model, *Problem().model)
    with pytest.raises(ValueError, match="layer '1' is not there here"):
        codes.load_state_dict(CodeDescent(two, layers=1).state_dict())


def test_gradients_that_are_not_finite_are_left_out_with_one_warning():
    problem = Problem()
    codes, before = CodeDescent(problem.model, gather=2), problem.codes.clone()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            (problem.loss(problem.train) * math.nan).backward()
            codes.step(problem.judge)
    assert [str(w.message).startswith("gradients or inputs") for w in seen] == [True]
    assert codes.skipped == 2
    assert torch.equal(problem.codes, before)
    for _ in range(2):
        problem.loss(problem.train).backward()
        steps = codes.step(problem.judge)
    assert steps[0].accepted


def test_codes_that_a_graph_still_needs_are_not_changed():
    problem = Problem()
    codes, before = CodeDescent(problem.model, gather=1), problem.codes.clone()
    loss = problem.loss(problem.train)
    with pytest.raises(RuntimeError, match="layer '0' has run forward and waits for its backward"):
        codes.step(problem.judge)
    assert torch.equal(problem.codes, before)
    loss.backward()
    assert codes.step(problem.judge)[0].proposed
    problem.loss(problem.train)  # dropped: no graph holds the codes
    codes.step(problem.judge)


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_a_closure_that_is_not_finite_takes_the_change_back(after):
    problem = Problem()
    codes, before = CodeDescent(problem.model, gather=1), problem.codes.clone()
    problem.loss(problem.train).backward()
    losses = iter([1.0, after])
    with pytest.warns(UserWarning, match="the closure's loss is not finite"):
        (step,) = codes.step(lambda: next(losses))
    assert not step.accepted
    assert torch.equal(problem.codes, before)


def test_an_error_in_the_closure_takes_the_change_back():
    problem = Problem()
    codes, before = CodeDescent(problem.model, gather=1), problem.codes.clone()
    problem.loss(problem.train).backward()
    losses = iter([1.0])
    with pytest.raises(TypeError, match="must return a loss"):
        codes.step(lambda: next(losses, None))
    assert torch.equal(problem.codes, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"share": 0}, "share must be"),
        ({"share": 1.5}, "share must be"),
        ({"gather": 0}, "layers and gather must be positive"),
        ({"layers": 0}, "layers and gather must be positive"),
        ({"damping": (0, 1)}, "damping must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        CodeDescent(Problem().model, **settings)


def test_models_without_layers_and_layers_that_are_watched_already_are_refused():
    with pytest.raises(ValueError, match="no compressed layers"):
        CodeDescent(nn.Linear(4, 4))
    problem = Problem()
    with CodeDescent(problem.model), pytest.raises(ValueError, match="has an observer already"):
        CodeDescent(problem.model)
    assert problem.model[0].observer is None


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    problem = Problem()
    model = nn.parallel.DistributedDataParallel(problem.model)
    codes = CodeDescent(model, gather=2, share=0.05)
    accepted = 0
    for _ in range(4):
        x = problem.train.chunk(2)[rank]
        (model(x) - x @ problem.target.t()).square().mean().backward()
        for step in codes.step(lambda: problem.loss(problem.held.chunk(2)[rank])):
            accepted += step.accepted
    torch.save({"codes": problem.codes, "accepted": accepted}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # Not by way of DistributedDataParallel's destructor: with the GIL held it joins a thread of the
    # process group, which may be waiting for the GIL to release a tensor.
    os._exit(0)


def test_two_ranks_make_the_same_codes():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
        one, two = (torch.load(f"{folder}/{rank}.pt") for rank in range(2))
    assert torch.equal(one["codes"], two["codes"])
    assert one["accepted"] == two["accepted"] > 0
    assert not torch.equal(one["codes"], Problem().codes)


def test_the_library_exports_it():
    assert rs.optim.CodeDescent is CodeDescent
