"""The command ``owl2-export convert``."""
