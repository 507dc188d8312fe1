"""Whether a bundle fits a device: memory, speed, and the devices known by name."""
