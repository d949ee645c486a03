"""Training tables never holds a dense copy of a layer: peak memory of a forward and a backward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 64 << 20
SHAPE = (8192, 4096)  # 134 MB as float32
WIDE = (1024, 28672)  # the widest layer of the 70 B models: one block of 128 rows is 15 MB
NAMES = ("trellis", "uniform", "palette", "cyclic", "bitfield")
CASES = [(name, mode, SHAPE) for name in NAMES for mode in ("auto", "exact")]
CASES += [(name, "generic", SHAPE) for name in ("trellis", "uniform")]
CASES += [("trellis", mode, WIDE) for mode in ("auto", "exact")]

# Each case in a process of its own, forked from one that has torch loaded and no thread started:
# what one leaves in the heap must not hide what the next one takes. The kernel's own count of
# resident pages sees every allocation, torch's and others', and is set back before the call.
PROGRAM = """
import json, os, sys
import torch, walk
import reality_stone as rs
from reality_stone import ops
from reality_stone.nn import RBELinear

def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def train(layer, x, grad):
    layer(x).backward(grad)

def measure(name, mode, shape):
    codec = rs.codec(name)
    isa = "generic" if mode == "generic" else ops.best_isa()
    with ops.use_isa(isa), ops.accuracy("exact" if mode == "exact" else "auto"):
        small = RBELinear.from_packed(walk.random_layer(codec, (256, 512)))
        train(small, torch.randn(64, 512, requires_grad=True), torch.randn(64, 256))
        layer = RBELinear.from_packed(walk.random_layer(codec, shape))
        x, grad = torch.randn(64, shape[1], requires_grad=True), torch.randn(64, shape[0])
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = resident("VmRSS")
        train(layer, x, grad)
        peak = resident("VmHWM") - before
    grads = x.grad.nbytes + sum(p.grad.nbytes for p in layer.parameters())
    dense = x.new_ones(shape)
    return {"peak": peak, "grads": grads, "with_dense": resident("VmHWM") - before}

torch.set_num_threads(1)
RBELinear.from_packed(walk.random_layer(rs.codec("uniform"), (16, 64)))(torch.zeros(1, 64))
for name, mode, shape in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    print(json.dumps([name, mode, shape, measure(name, mode, shape)]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def measured():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory can be set back on Linux alone")
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (json.loads(line) for line in done.stdout.splitlines())
    return {(name, mode, tuple(shape)): found for name, mode, shape, found in lines}


@pytest.mark.parametrize(("name", "mode", "shape"), CASES)
def test_a_forward_and_backward_takes_below_64_mb_beside_the_gradients(measured, name, mode, shape):
    found = measured[name, mode, shape]
    assert found["peak"] <= LIMIT + found["grads"], found


def test_the_measurement_would_see_a_dense_copy(measured):
    for found in measured.values():
        assert found["with_dense"] > 100 << 20, found
