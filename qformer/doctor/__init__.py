"""Checks a config on the machine at hand before hours are spent on it; `stages/doctor.py` is its command."""
