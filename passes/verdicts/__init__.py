"""The decisions in words: a verdict on every norm, what stands in the way, the streams as people draw them."""
