"""The command line: Lightning's subcommands and our own."""
