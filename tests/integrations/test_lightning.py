"""PyTorch Lightning: configure_optimizers with a scheduler; checkpoint and resume."""

import logging

import pytest

pytest.importorskip("lightning")

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

import warpstep
from training import (
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    calls_taken,
    launches,
    rows,
    weights,
)

STEPS = 3  # an epoch

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(LightningModule):
    def __init__(self, cls, **options):
        super().__init__()
        self.model = SideBySide()
        self.new_optimizer = lambda: cls(self.model.parameters(), **OPTIONS, **options)

    def training_step(self, batch, _):
        return self.model(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = self.new_optimizer()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class ClippedInTheStep(Module):
    """As docs/integrations.md has it: one read of the gradients, applied in the step's pass."""

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer.clip_grad_norm_(gradient_clip_val, scaler=scaler)


def fit(module, folder, epochs, checkpoint=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=0.1,
        **options,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(rows(4 * STEPS), batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    assert trainer.global_step == STEPS * epochs
    return trainer


def run(folder, cls, **options):
    module = Module(cls, **options)
    return fit(module, folder, 2), weights(module.model)


def test_lightning(tmp_path):
    _, theirs = run(tmp_path, torch.optim.AdamW, fused=True)
    with launches(2 * STEPS):
        trainer, ours = run(tmp_path, warpstep.AdamW)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is warpstep.AdamW
    assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [len(ours)]
    assert_agree(ours, theirs, 2 * STEPS)


def test_lightning_resumes(tmp_path):
    _, whole = run(tmp_path, warpstep.AdamW)
    fit(Module(warpstep.AdamW), tmp_path, 1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = Module(warpstep.AdamW)
    with launches(STEPS):
        fit(resumed, tmp_path, 2, tmp_path / "one.ckpt")
    assert_same_bits(weights(resumed.model), whole)
    _, theirs = run(tmp_path, torch.optim.AdamW, fused=True)
    assert_agree(weights(resumed.model), theirs, 2 * STEPS)


def test_lightning_enabled(tmp_path):
    _, theirs = run(tmp_path, torch.optim.AdamW, fused=True)
    with calls_taken(2 * STEPS):
        _, ours = run(tmp_path, torch.optim.AdamW, fused=True)
    assert_agree(ours, theirs, 2 * STEPS)


def half_precision():
    """16-mixed, which Lightning's own flag takes on GPUs only; at first the scale is too large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


MIXED = {"bf16-mixed": lambda: {"precision": "bf16-mixed"}, "16-mixed": half_precision}


def mixed_run(folder, module, precision, **options):
    trainer = fit(module, folder, 2, **MIXED[precision](), **options)
    scaler = trainer.precision_plugin.scaler
    if scaler is None:
        return weights(module.model), None
    assert scaler.get_scale() < 2.0**17  # steps were skipped
    return weights(module.model), scaler.get_scale()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", MIXED)
def test_lightning_clips_in_mixed_precision(tmp_path, precision, algorithm):
    """As with torch.optim.AdamW(params): Lightning unscales and clips before the step."""
    how = {"gradient_clip_algorithm": algorithm}
    theirs, their_scale = mixed_run(tmp_path, Module(torch.optim.AdamW), precision, **how)
    ours, scale = mixed_run(tmp_path, Module(warpstep.AdamW), precision, **how)
    assert scale == their_scale
    assert_agree(ours, theirs, 2 * STEPS)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("precision", MIXED)
def test_lightning_clips_in_the_step(tmp_path, precision, fused):
    theirs, their_scale = mixed_run(tmp_path, Module(torch.optim.AdamW), precision)
    ours, scale = mixed_run(tmp_path, ClippedInTheStep(warpstep.AdamW, fused=fused), precision)
    assert scale == their_scale
    assert_agree(ours, theirs, 2 * STEPS)


def test_lightning_refuses_a_fused_optimizer_as_it_does_torchs(tmp_path):
    for cls in (torch.optim.AdamW, warpstep.AdamW):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            mixed_run(tmp_path, Module(cls, fused=True), "bf16-mixed")
