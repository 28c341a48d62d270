"""Fault tolerance: from a lost rank to the next plan in force, and back to full strength."""
