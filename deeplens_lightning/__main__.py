"""`python -m deeplens_lightning`: the command line."""

from deeplens_lightning.cli.main import main

if __name__ == "__main__":
    main()
