"""``python -m warpstep``: what is available here, what would be chosen, and why not the others."""

from warpstep.report import status

print(status())
