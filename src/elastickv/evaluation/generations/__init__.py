"""Texts that a model generates with each cache, greedily and by sampling, compared with those of full attention."""
