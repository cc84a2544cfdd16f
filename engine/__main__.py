"""`python -m engine`: the command line."""

from engine.command import main

main()
