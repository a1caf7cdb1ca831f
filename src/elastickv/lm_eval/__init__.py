"""Models with an elastic cache for lm-evaluation-harness.

Importing `elastickv.lm_eval.elastic_lm` registers the model `elastickv`. The harness after 0.4.13 finds it by the entry point
`lm_eval.models` of this package (its pull request 4013); `python -m elastickv.lm_eval` is the harness's own command with that
model registered, for any version.
"""
