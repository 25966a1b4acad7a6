"""From an adapter and its base to a standalone model that is verified, and back."""
