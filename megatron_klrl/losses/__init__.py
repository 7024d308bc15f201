"""The policy loss."""
