"""Megatron-Core: the only package that imports megatron."""
