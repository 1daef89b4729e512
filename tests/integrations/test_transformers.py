"""Hugging Face's Trainer."""

import pytest

pytest.importorskip("transformers")

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import warpstep
from training import (
    LR,
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    calls_taken,
    launches,
    rows,
    weights,
)

STEPS = 6
# The Trainer gives its groups the arguments' weight decay.
WARPSTEP = (warpstep.AdamW, {"lr": LR, "betas": OPTIONS["betas"]})


def new_trainer(folder, model, data, **options):
    """A Trainer on the CPU; options of TrainingArguments, or ``optimizer_cls_and_kwargs``."""
    chosen = options.pop("optimizer_cls_and_kwargs", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=LR,
        weight_decay=OPTIONS["weight_decay"],
        adam_beta2=OPTIONS["betas"][1],
        lr_scheduler_type="linear",
        warmup_steps=2,
        save_steps=STEPS // 2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=chosen)


def run(folder, **options):
    """Trains a model whose gradients do not depend on its weights. Returns weights, optimizer."""
    trainer = new_trainer(folder, SideBySide(), rows(4 * STEPS), **options)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return weights(trainer.model), trainer.optimizer.optimizer


def torch_run(folder):
    ours, optimizer = run(folder, optim="adamw_torch_fused")
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]
    return ours


def test_trainer_takes_warpstep(tmp_path):
    with launches(STEPS):
        ours, optimizer = run(tmp_path / "w", optimizer_cls_and_kwargs=WARPSTEP)
    assert type(optimizer) is warpstep.AdamW
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [OPTIONS["weight_decay"], 0]  # biases are not decayed
    assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [len(ours)]
    assert_agree(ours, torch_run(tmp_path / "t"), STEPS)


def test_trainer_enabled(tmp_path):
    with calls_taken(STEPS):
        ours = torch_run(tmp_path / "w")
    assert_agree(ours, torch_run(tmp_path / "t"), STEPS)


def test_trainer_resumes_a_gpt2(tmp_path):
    def new(folder):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
        tokens = torch.randint(50, (4 * STEPS, 16), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": row, "labels": row} for row in tokens]
        model = GPT2LMHeadModel(config)
        return new_trainer(folder, model, data, optimizer_cls_and_kwargs=WARPSTEP)

    whole = new(tmp_path)
    start = weights(whole.model)
    with launches(STEPS):
        whole.train()
    resumed = new(tmp_path)
    with launches(STEPS // 2):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert not any(torch.equal(p, start[name]) for name, p in weights(whole.model).items())
