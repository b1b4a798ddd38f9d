"""`python -m tapestry.node.cli`, which is the `tapestry` command without its entry point."""

from tapestry.node.cli.entry import main

if __name__ == "__main__":
    main()
