"""Makes answers and Monte Carlo labels with a policy model: see `reweighting/label.py`."""
