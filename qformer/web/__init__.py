"""The demo page: what a trained adapter does, seen in a browser. `stages/web.py` starts it, docs/web.md describes it."""
