"""Quantizers of a page that choose codes channel by channel."""
