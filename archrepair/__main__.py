"""`python -m archrepair` is the `archrepair` command."""

from archrepair.cli.app import main

if __name__ == "__main__":
    main()
