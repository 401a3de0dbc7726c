"""Corpora: spoken commands and novels read aloud, which are made here; and real data of people and
simulators, read from a folder of the user."""
