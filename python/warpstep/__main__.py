"""``python -m warpstep``: what is available here, what would be chosen, and why not the others."""

from warpstep.backends import status

print(status())
