"""ultra: index layout, transforms, and a codebook that a whole model shares."""

import dataclasses

import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone import inspection, ops, reference, tensorfile
from reality_stone.codecs.ultra import Ultra, transformed, vectors

SHARED = "ultra(codebook=model, percent=1)"


def test_every_index_and_every_transform_decodes_to_its_vector():
    codec = Ultra(percent=0)
    index = torch.arange(1024).view(256, 4)
    word = (index << torch.arange(0, 40, 10)).sum(1)
    codes = ((word[:, None] >> torch.arange(0, 40, 8)) & 255).to(torch.uint8)[:, None]
    codebook = walk.gaussian(1024, 4)
    for t in range(8):
        params = [codebook, torch.tensor([t], dtype=torch.uint8), torch.ones(256)]
        want = transformed(codebook, t)[index].view(256, 16)
        assert walk.same_bits(ops.decode(codes, params, codec.spec, (256, 16)), want)
        assert walk.same_bits(reference.decode(codes, params, codec.spec, (256, 16)), want)


def test_the_eight_transforms_are_the_documented_ones():
    v = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    seen = [transformed(v, t)[0].tolist() for t in range(8)]
    assert seen[:4] == [[1, 2, 3, 4], [-1, -2, -3, -4], [4, 3, 2, 1], [-4, -3, -2, -1]]
    assert seen[4:] == [[3, 4, 1, 2], [-3, -4, -1, -2], [2, 1, 4, 3], [-2, -1, -4, -3]]


def test_a_transform_of_eight_is_refused():
    packed = walk.encoded(Ultra(percent=0), (16, 32))
    bad = packed.params | {"transform": torch.tensor([8], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="transform must be below 8"):
        dataclasses.replace(packed, params=bad).check()


def test_vectors_of_a_gaussian_err_as_much_as_theory_says():
    # Zador's bound for four dimensions, G4 = .0766, at 2.5 bits: .0507 for an ideal codebook.
    weight = walk.gaussian(512, 1024)
    packed = Ultra(percent=0).encode(weight)
    assert walk.nmse(packed.decode(), weight) == pytest.approx(0.0507, rel=0.03)


def test_a_given_codebook_is_kept_and_its_best_transform_found():
    weight = walk.gaussian(128, 256) + torch.tensor([1.5, 0.7, 0.0, -0.5]).repeat(64)
    own = Ultra(percent=0).encode(weight)
    for t in range(8):
        # The codebook as a layer whose transform undoes t would want it.
        turned = transformed(own.params["codebook"], t)
        packed = Ultra(codebook="model", percent=0).encode(weight, given={"codebook": turned})
        assert torch.equal(packed.params["codebook"], turned)
        undone = transformed(turned, int(packed.params["transform"]))
        assert torch.equal(undone, own.params["codebook"])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 80))


def test_a_model_holds_one_codebook_in_memory_in_its_file_and_after_loading(tmp_path):
    net = model()
    report = rs.compress(net, codec=SHARED, calibration=torch.randn(64, 96), progress=False)
    layers = [net[0], net[2], net[3]]
    assert layers[0].codebook is layers[1].codebook is layers[2].codebook
    table = 1024 * 4 * 16
    assert layers[1].bits_per_weight * 8192 - report.layers[1].bits_per_weight * 8192 == table
    assert report.layers[0].bits_per_weight == layers[0].bits_per_weight

    rs.save(net, tmp_path / "m")
    header = tensorfile.read_header(tmp_path / "m" / "model.safetensors")
    assert [name for name in header.entries if name.endswith("codebook")] == ["0.codebook"]
    found = inspection.inspect(tmp_path / "m")
    assert found.sound
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)

    other = rs.load(model(), tmp_path / "m")
    assert other[0].codebook is other[2].codebook is other[3].codebook
    x = torch.randn(5, 96)
    assert torch.equal(other(x), net(x))
    other(x).sum().backward()
    parts = [p for p in other.parameters() if p.shape == (1024, 4)]
    assert len(parts) == 1
    assert parts[0].grad.any()


def test_a_file_whose_shared_codebook_is_missing_is_refused(tmp_path):
    net = model()
    rs.compress(net, codec=SHARED, progress=False)
    rs.save(net, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    header = tensorfile.read_header(path)
    with path.open("rb") as file:
        tensors = {n: tensorfile.read_tensor(header, e, file) for n, e in header.entries.items()}
    for place in ('"nowhere"', "3", '"0.codes"', "null"):
        metadata = {k: v for k, v in header.metadata.items() if k != "sha256"}
        tensorfile.write(path, tensors, metadata | {"tied": f'{{"2.codebook": {place}}}'})
        with pytest.raises(ValueError, match=r"2\.codebook' is"):
            rs.load(model(), tmp_path / "m")


def test_common_params_are_fitted_on_all_layers():
    small, large = walk.gaussian(16, 64), walk.gaussian(256, 512) + 2
    codec = Ultra(codebook="model")
    table = codec.fit_common([small, large])["codebook"]
    assert table.shape == (1024, 4)

    def error(w):
        points = vectors(w, 1 << 30)
        nearest = ((points[:, None] - table) ** 2).sum(-1).min(1).values
        return (nearest.sum() / points.pow(2).sum()).item()

    assert error(large) < 0.05
    assert error(small) < 0.5  # an eightieth of the weights, far from the others
