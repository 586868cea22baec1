"""Devices, processes and compiler options: the only room that knows how many of them there are."""
