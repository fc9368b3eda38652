"""The `deeplens-lightning` command line: Lightning's subcommands, and commands of this package."""
