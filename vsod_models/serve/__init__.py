"""`vsod serve`: a page to try models on, and one to correct coarse labels by hand."""
