"""From a picture's file to a latent."""
