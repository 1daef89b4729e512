"""The published experiments that AdamW rests on, asked again in small: `make experiments`."""
