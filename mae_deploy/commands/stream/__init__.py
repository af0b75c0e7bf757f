"""`mae-deploy stream`: a camera's or a file's frames through a bundle, as they come."""
