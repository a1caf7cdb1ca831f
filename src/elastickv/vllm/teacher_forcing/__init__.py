"""Engines of vLLM that generate given tokens, each in a process of its own: what they predict is measured."""
