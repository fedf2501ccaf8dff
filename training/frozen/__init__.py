"""Networks that only look: feature vectors and feature maps of images."""
