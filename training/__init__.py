"""Programs that made the small checkpoint, each run as `python -m training.NAME`, in the order of `scenes.sh`."""
