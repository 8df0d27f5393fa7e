"""How costs and memory grow: python -m tools.scale. The rows are in files.py, names.py, volumes.py, pins.py; ageing.py."""
