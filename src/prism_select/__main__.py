"""`python -m prism_select` is `prism`."""

from prism_select.cli.app import main

if __name__ == "__main__":
    main()
