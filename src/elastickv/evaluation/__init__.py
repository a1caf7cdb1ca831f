"""Quality of a real model under a recipe, measured through the real decode path, and the calibration of recipes."""
