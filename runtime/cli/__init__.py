"""The commands of ``owl2``: one module each, the options and the output they share."""
