"""An offloaded optimizer in a page: float32 masters and moments live far away from the model.

The model keeps 16 bits a weight. Its float32 masters and AdamW's moments are in the CPU's memory,
in one flat tensor each. As soon as the backward pass has made a gradient, a thread steps that range
of the flat tensors while the backward pass goes on. The same pass over them leaves new weights in
16 bits, which then go to the model. Without a GPU all is in one memory, and works the same way.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor, nn

from warpstep.functional import adamw_

HYPERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}


class Offloaded:
    """AdamW over the parameters of ``model``, with all that it keeps in the CPU's memory."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.params = list(model.parameters())
        sizes = [p.numel() for p in self.params]
        ends = accumulate(sizes)
        self.ranges = [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]
        self.master = torch.cat([p.detach().flatten().cpu().float() for p in self.params])
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.master) for _ in range(2))
        self.grad, self.weights = (torch.empty_like(self.master).bfloat16() for _ in range(2))
        self.this_step = torch.ones(())
        self.pool = ThreadPoolExecutor(threads) if threads else None
        self.at_work: list[Future[None]] = []
        for param, of_param in zip(self.params, self.ranges, strict=True):
            param.register_post_accumulate_grad_hook(lambda p, r=of_param: self._take(p, r))

    def _take(self, param: Tensor, of_param: slice) -> None:
        """A gradient is there: its range may be stepped while others are still being made."""
        self.grad[of_param].copy_(param.grad.flatten())
        param.grad = None
        if self.pool is not None:
            self.at_work.append(self.pool.submit(self._step, of_param))

    def _step(self, part: slice) -> None:
        """Steps a range. The kernel runs without the GIL, so the backward pass is not stopped."""
        adamw_(
            [self.master[part]],
            [self.grad[part]],
            [self.exp_avg[part]],
            [self.exp_avg_sq[part]],
            [],
            [self.this_step],
            **HYPERS,
            advance_steps=False,  # finish() counts it, once for all ranges
            copies=[self.weights[part]],
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Call after the backward pass: waits for the ranges; the model gets its new weights."""
        if self.pool is None:
            self._step(slice(None))  # everything at once, to compare with
        for future in self.at_work:
            future.result()
        self.at_work.clear()
        self.this_step += 1
        for param, of_param in zip(self.params, self.ranges, strict=True):
            param.copy_(self.weights[of_param].view(param.shape))


def train(threads: int, steps: int, width: int) -> tuple[Tensor, list[float]]:
    """The masters after training with so many threads (0: none), and the losses."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(width, 1)).to(device, torch.bfloat16)
    optimizer, losses = Offloaded(model, threads), []
    for _ in range(steps):
        x = torch.randn(64, width, device=device, dtype=torch.bfloat16)
        loss = (model(x).squeeze(1) - x[:, 0]).float().square().mean()
        loss.backward()  # ranges are stepped meanwhile
        optimizer.finish()
        losses.append(loss.item())
    return optimizer.master, losses


def main() -> None:
    """Trains both ways, and says whether the weights are the same to the bit."""
    overlapped, losses = train(threads=2, steps=50, width=512)
    plain, _ = train(threads=0, steps=50, width=512)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} with {overlapped.numel():,} weights")
    print("chunks beside the backward pass and a plain step:", end=" ")
    print("the same bits" if torch.equal(overlapped, plain) else "DIFFERENT BITS")


if __name__ == "__main__":
    main()
