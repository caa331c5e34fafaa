"""One HTML file that shows runs or an experiment: a page, its curves, what a run left, and answers beside their images."""
