"""torch's own optimizers on warpstep's kernels: ``enable()``, and ``replace()`` for a live one."""
