"""The Hub: licenses, records, cards, uploads."""
