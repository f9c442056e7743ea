"""A second pass of the teacher over chains that exist: hidden states and attention, in a table of their own."""
