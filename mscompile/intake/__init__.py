"""What comes from outside, vetted before it is believed: models and data."""
