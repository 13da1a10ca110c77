"""Measurements of backprop_gpu; run from the top of a checkout."""
