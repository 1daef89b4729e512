"""``import warpstep.autoenable`` calls ``warpstep.enable()``: one line for an existing program."""

from warpstep.enabling.override import enable

enable()
