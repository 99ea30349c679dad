"""What happens when a prefill ends: the policy is asked, the rest is evicted."""
