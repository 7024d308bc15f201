"""What a run will need before it starts: memory per rank and phase, layouts that fit, time, bottleneck. No torch."""
