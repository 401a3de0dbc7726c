"""Corpora that are made here: spoken commands, and novels read aloud."""
