"""What a rank knows of its surroundings: world, device, seeds, logs, timers."""
