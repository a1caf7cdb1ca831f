"""`python -m elastickv` is `elastickv`."""

from elastickv.cli import main

if __name__ == "__main__":
    main()
