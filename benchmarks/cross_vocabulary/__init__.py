"""What of a teacher reaches students with another vocabulary, in bits per byte."""
