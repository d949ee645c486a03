"""Evaluation and training of tables on a tiny model."""

import math

import pytest
import torch
import walk
from models import Bigram, bigrams

import reality_stone as rs
from reality_stone.packed import storage_dtype
from reality_stone.training import table_parameters


@pytest.fixture
def models():
    return bigrams()


@pytest.fixture
def tokens():
    return torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(2))


def test_perplexity_is_the_exponential_of_the_mean_loss_over_cold_windows(models, tokens):
    dense, _ = models
    log_p = dense(tokens)[:, :-1].log_softmax(-1)
    want = math.exp(-log_p.gather(-1, tokens[:, 1:, None]).double().mean().item())
    got = rs.evaluate(dense, tokens.flatten(), context=12, progress=False)
    assert got.perplexity == pytest.approx(want, rel=1e-5)  # sums in float32 by batches
    assert got.tokens == 64 * 11


def test_kl_is_zero_for_the_model_itself_and_positive_for_another(models, tokens):
    dense, packed = models
    assert rs.kl_divergence(dense, dense, tokens, context=12) == pytest.approx(0, abs=1e-7)
    assert rs.kl_divergence(packed, dense, tokens, context=12) > 1e-4


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="less than one window"):
        rs.perplexity(Bigram(), torch.zeros(5, dtype=torch.long), context=12)


def test_training_the_tables_brings_the_model_closer_and_leaves_the_codes(models, tokens):
    dense, packed = models
    codes = {n: b.clone() for n, b in packed.named_buffers() if n.endswith("codes")}
    before = rs.kl_divergence(packed, dense, tokens, context=12)
    report = rs.finetune(packed, tokens, dense, epochs=10, batch=16, lr=5e-3, progress=False)
    assert rs.kl_divergence(packed, dense, tokens, context=12) < 0.8 * before
    assert all(torch.equal(b, codes[n]) for n, b in packed.named_buffers() if n in codes)
    assert len(report.losses) == 40
    assert report.tokens == 40 * 16 * 11
    assert report.losses[-1] < report.losses[0]


def test_params_are_still_stored_in_sixteen_bits_after_training(models, tokens):
    dense, packed = models
    before = [m.bits_per_weight for m in packed.modules() if isinstance(m, rs.nn.RBELinear)]
    rs.finetune(packed, tokens, dense, progress=False)
    after = [m.bits_per_weight for m in packed.modules() if isinstance(m, rs.nn.RBELinear)]
    assert after == before
    assert all(storage_dtype(p.detach()) == torch.float16 for p in table_parameters(packed))


def test_training_restores_modes_and_gradient_flags(models, tokens):
    _, packed = models
    packed.train()
    packed.head.weight.requires_grad_(False)
    rs.finetune(packed, tokens[:16], progress=False)
    assert packed.training
    assert not packed.head.weight.requires_grad
    assert packed.embed.weight.requires_grad
    assert all(p.grad is None for p in packed.parameters())


def test_a_step_that_is_not_finite_is_skipped_once_warned_and_counted(models, tokens):
    dense, packed = models
    with torch.no_grad():
        packed.embed.weight[5] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        report = rs.finetune(packed, tokens, dense, progress=False)
    assert report.skipped > 0
    assert all(bool(p.isfinite().all()) for p in table_parameters(packed))


def test_a_dense_model_has_nothing_to_train(models, tokens):
    with pytest.raises(ValueError, match="compress first"):
        rs.finetune(models[0], tokens)
    with pytest.raises(ValueError, match="mode"):
        rs.finetune(models[1], tokens, mode="other")


def test_modules_that_were_in_eval_mode_stay_so(models, tokens):
    dense, packed = models
    packed.train()
    packed.body.eval()
    rs.evaluate(packed, tokens, context=12, reference=dense, progress=False)
    rs.finetune(packed, tokens[:16], progress=False)
    assert packed.training
    assert not packed.body.training


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_every_codec_compresses_a_model_by_plan_trains_and_comes_back_from_a_file(codec, tmp_path):
    torch.manual_seed(0)
    dense = Bigram().eval()
    packed = Bigram().eval()
    packed.load_state_dict(dense.state_dict())
    tokens = torch.randint(32, (32, 12), generator=torch.Generator().manual_seed(2))
    plan = [("body.*", codec), ("head", None)]
    rs.compress(packed, calibration=tokens, plan=plan, progress=False)
    assert packed.body[0].codec == packed.body[2].codec == codec
    before = {n: p.detach().clone() for n, p in packed.body.named_parameters()}
    codes = [packed.body[i].codes.clone() for i in (0, 2)]
    start = rs.kl_divergence(packed, dense, tokens, context=12)
    rs.finetune(packed, tokens, teacher=dense, epochs=4, batch=4, progress=False)
    assert all(torch.equal(packed.body[i].codes, c) for i, c in zip((0, 2), codes, strict=True))
    moved = [n for n, p in packed.body.named_parameters() if not torch.equal(p, before[n])]
    # Everything trainable is reached by its gradient.
    assert moved == [n for n in before if not n.endswith("bias")]
    assert rs.kl_divergence(packed, dense, tokens, context=12) < start
    rs.save(packed, tmp_path / "m")
    again = rs.load(Bigram().eval(), tmp_path / "m")
    assert torch.equal(again(tokens), packed(tokens))
