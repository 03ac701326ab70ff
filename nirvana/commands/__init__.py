"""The subcommands of ``nirvana``: one file each, with its options and what it prints."""
