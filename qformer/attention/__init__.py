"""What the queries look at: maps over the image, of queries and of words, and pictures of them."""

from qformer.attention.maps import AttentionMaps, attention_of_match, attention_of_text

__all__ = ["AttentionMaps", "attention_of_match", "attention_of_text"]
