"""``import warpstep.autoenable`` calls ``warpstep.enable()``, for programs that cannot be edited."""

from warpstep.override import enable

enable()
