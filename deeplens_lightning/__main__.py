"""Run the command line with `python -m deeplens_lightning`."""

from deeplens_lightning.cli.main import main

if __name__ == "__main__":
    main()
