"""`python -m shoal.node` is the `shoal` command."""

from shoal.node.cli import main

main()
