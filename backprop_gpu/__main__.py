"""`python -m backprop_gpu` is `backprop-gpu`."""

from .cli import main

main()
