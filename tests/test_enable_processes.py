"""What enables warpstep in a process of its own: an import, the environment, a call."""

import pytest

from support import programs
from support.environment import EMULATED

pytestmark = pytest.mark.skipif(EMULATED, reason="the CPU's kernel is enabled elsewhere")

PROGRAM = """
import torch, warnings
warnings.simplefilter("error")
{first}
import warpstep
kernel = torch._C._dispatch_dump("aten::_fused_adamw_")
params = [torch.nn.Parameter(torch.ones(3)) for _ in range(9)]
for p in params:
    p.grad = torch.ones(3)
{then}
torch.optim.AdamW(params, fused={fused}).step()
warpstep.status()
print(warpstep.status().enabled, warpstep.status().taken)
"""


def run(first="", then="", fused=True, **environment):
    program = PROGRAM.format(first=first, then=then, fused=fused)
    done = programs.run(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["False", "0"]),
        ({"first": "import warpstep.autoenable"}, ["True", "1"]),
        ({"WARPSTEP_ENABLE": "1"}, ["True", "1"]),
        ({"WARPSTEP_ENABLE": "0"}, ["False", "0"]),
        ({"WARPSTEP_ENABLE": "all", "fused": None}, ["True", "1"]),
        ({"then": "warpstep.enable()"}, ["True", "1"]),
        ({"then": "warpstep.enable(); warpstep.disable(); warpstep.enable()"}, ["True", "1"]),
        ({"then": "filters = list(__import__('warnings').filters); warpstep.enable(); "
          "assert filters == __import__('warnings').filters"}, ["True", "1"]),
    ],
    ids=["import", "autoenable", "environment", "environment 0", "environment all", "enable",
         "again", "filters"],
)  # fmt: skip
def test_processes(arguments, expected):
    """Importing enables nothing unless asked to; nothing warns, nothing is printed."""
    assert run(**arguments) == (expected, "")
