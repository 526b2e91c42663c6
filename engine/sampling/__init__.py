"""From logits to the next tokens: penalties, masks, filters and the choice, row by row.

It knows no model, and of a request only how its tokens are chosen.
"""
