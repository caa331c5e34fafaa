"""CapFilt (BLIP, arXiv 2201.12086, section 3.3): captions written for web images, and a filter on both kinds of captions."""
