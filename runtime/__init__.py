"""Runtime of owl2: runs a bundle without torch."""
