"""Responses from a policy, ranked by the reward, and pairs made of them."""
