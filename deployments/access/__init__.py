"""Access: API keys, their limits, and a ledger of what was served to them."""
