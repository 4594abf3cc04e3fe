"""`python -m unite_fast ...` and `torchrun -m unite_fast ...`."""

from unite_fast.cli import main

main()
