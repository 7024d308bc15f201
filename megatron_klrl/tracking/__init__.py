"""Where measurements go: files, TensorBoard, the terminal, the run card."""
