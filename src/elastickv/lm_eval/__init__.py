"""Models with an elastic cache for lm-evaluation-harness.

Importing `elastickv.lm_eval.elastic_lm` registers the model `elastickv`; `python -m elastickv.lm_eval` is the harness's own
command with that model registered, since the harness (0.4.13) finds no models in other packages by itself.
"""
