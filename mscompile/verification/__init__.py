"""Interventions by graph surgery, and what they prove."""
