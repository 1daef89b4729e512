"""``import warpstep.autoenable`` calls ``warpstep.enable()``: one line for an existing program."""

from warpstep.override import enable

enable()
