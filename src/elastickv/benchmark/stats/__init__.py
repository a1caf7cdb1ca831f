"""Estimates, intervals and changepoints from timed samples."""
