"""What is measured, and its meaning."""
