"""Programs that train a model, each run as `python -m training.NAME`; `scenes.sh` runs them in order."""
