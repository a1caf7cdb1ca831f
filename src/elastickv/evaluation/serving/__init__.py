"""Evaluation of what vLLM serves."""
