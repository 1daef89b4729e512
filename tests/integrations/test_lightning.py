"""PyTorch Lightning: configure_optimizers with a scheduler; checkpoint and resume."""

import logging

import pytest

pytest.importorskip("lightning")

import torch
from lightning import LightningModule, Trainer

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


def fit(module, folder, epochs, checkpoint=None):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=0.1,
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
