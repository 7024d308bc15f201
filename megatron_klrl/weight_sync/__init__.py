"""Weights from the ranks that train to the engines that sample: a plan made once, and transports that carry it out."""
