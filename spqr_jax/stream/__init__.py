"""A model as a stream: its blocks one at a time, and text on its way through them."""
