"""Tools of the project itself: setting up, and pages made from code."""
