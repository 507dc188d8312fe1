"""Speed and memory of a bundle on this machine, and how near they are to what the machine can do."""
