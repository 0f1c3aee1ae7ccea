"""`python -m imagefarm` is the command `imagefarm`."""

from imagefarm.cli import main

main()
