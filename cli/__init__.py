"""The `ft` command: one short file per command."""
