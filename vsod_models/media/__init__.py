"""Videos, folders of frames and pictures: read, written, and what is shown of a prediction."""
